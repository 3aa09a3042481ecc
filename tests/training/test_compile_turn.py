"""One rank of a node compiles, the others take what it compiled."""

from __future__ import annotations

import os
import threading
import uuid
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from diffscale.config.factory import build_diffusion, build_model
from diffscale.data import Dataset
from diffscale.kernels.runtime import why_not_compiled
from diffscale.training.compile_turn import CompileTurn
from diffscale.training.learner import Learner
from diffscale.training.numerics import Numerics
from diffscale.training.parallel import World

from .small import experiment
from .test_parallel import train


def test_a_later_rank_begins_its_first_pass_when_that_of_the_first_has_ended() -> None:
    attempt, events = uuid.uuid4().hex, []
    first = CompileTurn(World(node_rank=0, node_size=2), attempt)
    later = CompileTurn(World(node_rank=1, node_size=2), attempt)

    def pass_of_later() -> None:
        with later.taken():
            events.append("later")

    thread = threading.Thread(target=pass_of_later)
    thread.start()
    with first.taken():
        thread.join(0.3)
        events.append("first")
    thread.join(10)
    assert events == ["first", "later"]
    with later.taken(), first.taken():  # no later pass waits
        pass


def test_a_rank_alone_on_its_node_waits_for_nobody() -> None:
    with CompileTurn(World(node_rank=0, node_size=1), uuid.uuid4().hex).taken():
        pass


def rank_main(rank: int, folder: str, storage: str, dataset: Dataset) -> None:
    from torch._dynamo.utils import counters

    os.environ |= {"TORCHINDUCTOR_CACHE_DIR": f"{folder}/cache", "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    world = World(rank, 2, node_rank=rank, node_size=2)
    e = experiment(storage)
    torch.manual_seed(0)
    model = Numerics(compile=True).prepare(build_model(e, dataset))
    turn = CompileTurn(world, "attempt")
    numerics = Numerics(compile=True)
    of = Learner(model, build_diffusion(e, dataset), e, world, numerics, dataset.num_classes, turn=turn)
    train(of, dataset, 1)
    counted = {name: counters["inductor"][f"fxgraph_cache_{name}"] for name in ("hit", "miss")}
    if rank == 0:
        assert counted["miss"] > 0
    else:
        assert counted["miss"] == 0, counted
        assert counted["hit"] > 0
    dist.destroy_process_group()


@pytest.mark.slow
def test_later_ranks_compile_nothing(shared_storage: Path, dataset: Dataset, tmp_path: Path) -> None:
    if reason := why_not_compiled("cpu"):
        pytest.skip(reason)
    mp.spawn(rank_main, args=(str(tmp_path), str(shared_storage), dataset), nprocs=2)
