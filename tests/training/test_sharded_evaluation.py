"""A model whose weights are sharded is evaluated while no rank holds all of them, and gives the same samples."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from diffscale.config.factory import build_diffusion
from diffscale.data import Dataset
from diffscale.training.checkpoint import layout as ck
from diffscale.training.checkpoint import saver as saving
from diffscale.training.checkpoint.state import is_sharded, local_shard
from diffscale.training.checkpoint_evaluation import CheckpointEvaluator
from diffscale.training.numerics import Numerics
from diffscale.training.parallel import World
from diffscale.training.validation_loss import validation_loss

from .small import experiment
from .test_parallel import make, train

RANKS = 2
# Three chunks, the last one short: in both rounds one of two ranks has fewer batches to draw than the other.
EVALUATED: dict[str, Any] = {"metrics": [], "n_generated": 150, "batch": 16, "grid_images": 150}
KINDS: dict[str, dict[str, Any]] = {"ddp": {}, "averages": {"shard_ema": True}, "fsdp2": {"parallel": "fsdp2"}}


def rank_main(rank: int, folder: str, storage: str, dataset: Dataset) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS)
    world, losses = World(rank, RANKS), []
    for kind, settings in KINDS.items():
        run = f"{folder}/{kind}"
        learner = make(storage, dataset, world, numerics=Numerics(), **settings)
        e = experiment(storage, train=settings, eval=EVALUATED | {"solver": {"name": "ddim", "steps": 2}})
        evaluator = CheckpointEvaluator(e, dataset, build_diffusion(e, dataset), world, Numerics())
        weights = evaluator.averaged(learner)
        assert {is_sharded(p) for p in weights.model.parameters()} == {kind == "fsdp2"}
        columns = {"images_seen": 0, "run_id": kind, "settings": {}}
        evaluator.evaluate(weights, columns, run_folder=run, evaluated_on="training workers", trajectories=2)
        held = (dataset.heldout, evaluator.diffusion, Numerics(), world)
        losses.append(validation_loss(weights.model, *held, batch=16, threads=1))
        train(learner, dataset, 1)
        saver = saving.Saver(run, rank, learner.holders, "a", ck.save_settings(e), lambda _: None)
        saver.save(saving.snapshot(learner, {"record": {}, "data": {}}, rank))
        saver.wait()
        world.barrier()
        now = {name: local_shard(t).clone() for name, t in evaluator.averaged(learner).model.state_dict().items()}
        stored = evaluator.stored(ck.list_checkpoints(run)[-1]).model
        assert all(torch.equal(now[name], local_shard(t)) for name, t in stored.state_dict().items())
    assert losses[0] == losses[1] == losses[2]
    dist.destroy_process_group()


def test_the_samples_of_sharded_weights_are_those_of_replicated_ones(
    shared_storage: Path, dataset: Dataset, tmp_path: Path
) -> None:
    mp.spawn(rank_main, args=(str(tmp_path), str(shared_storage), dataset), nprocs=RANKS)
    for picture in ("samples/images-000000000.png", "trajectories/images-000000000.png"):
        one, *others = [Path(tmp_path, kind, picture).read_bytes() for kind in KINDS]
        assert all(other == one for other in others)
