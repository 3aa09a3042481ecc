"""Restoring on several real processes: each byte is read once, and damage is found on whichever rank it lies."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from diffscale.core import storage
from diffscale.data import Dataset
from diffscale.training.checkpoint import layout as ck
from diffscale.training.checkpoint import restore as restoring
from diffscale.training.checkpoint import saver as saving
from diffscale.training.checkpoint.tensors import Slice, read_group, write_group
from diffscale.training.learner import Learner
from diffscale.training.parallel import World

from .small import BATCH
from .test_learner import batches, learner
from .test_parallel import identical, make, train

KINDS: dict[str, dict[str, Any]] = {
    "ddp": {},
    "parts": {"checkpoint": {"parts": 2}},
    "averages": {"shard_ema": True},
    "fsdp2": {"parallel": "fsdp2"},
}
"""Settings `train` of the ways in which weights and averages lie on ranks and in files."""


def save(of: Learner, run_folder: str, world: World) -> None:
    settings = ck.save_settings(of.experiment)
    saver = saving.Saver(run_folder, world.rank, world.size, f"at {of.images_seen}", settings, lambda _: None)
    saver.save(saving.snapshot(of, {"record": {}, "data": {}}, world.rank, saver.buffer))
    saver.wait()
    world.barrier()


def again(storage_: str, dataset: Dataset, world: World, kind: str) -> Learner:
    """Return a learner that knows nothing."""
    of = make(storage_, dataset, world, **KINDS[kind])
    for p in of.model.parameters():
        p.data.zero_()
    return of


def rank_main(rank: int, folder: str, storage_: str, dataset: Dataset, place: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    world, read = World(rank, 2), []
    original = restoring.read_group
    restoring.read_group = lambda *args, **more: read.append(args[1]) or original(*args, **more)  # type: ignore[assignment]
    out: dict[str, Any] = {}
    averages: list[dict[str, torch.Tensor]] = []
    for kind in KINDS:
        run = f"{place}/{kind}"
        of = make(storage_, dataset, world, **KINDS[kind])
        train(of, dataset, 2)
        save(of, run, world)
        read.clear()
        found = again(storage_, dataset, world, kind)
        where = restoring.restore_newest(found, run, world)
        assert where is not None
        out[kind] = (where[0], identical(of, found), found.images_seen, len(read))
        if kind != "fsdp2":
            averages.append({name: torch.empty_like(p) for name, p in of.model.named_parameters()})
            found.ema.copy_to("halflife", averages[-1])
            stored = ck.read_weights(where[0], "halflife")
            assert all(torch.equal(averages[0][name], p) for name, p in averages[-1].items())
            assert all(torch.equal(averages[0][name], stored[name]) for name in averages[0])
        train(of, dataset, 1)
        save(of, run, world)
        newest = ck.folder_of(run, 3 * BATCH)
        written = "ema/halflife.safetensors" if kind == "ddp" else "ema/halflife.00001-of-00002.safetensors"
        if rank == 0:  # in the second case it is rank 1 that reads the damaged file
            data = storage.read_bytes(f"{newest}/{written}")
            storage.write_bytes(f"{newest}/{written}", data[:-1] + bytes([data[-1] ^ 1]))
        world.barrier()
        before = restoring.restore_newest(again(storage_, dataset, world, kind), run, world)
        assert before is not None
        assert ck.images_of(before[0]) == 2 * BATCH
        world.barrier()
        assert [ck.images_of(c) for c in ck.list_checkpoints(run)] == [2 * BATCH]
    every = world.gather(out)
    if rank == 0:
        torch.save(every, f"{folder}/out.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module", params=["local", pytest.param("s3", marks=pytest.mark.slow)])
def results(
    shared_storage: Path, dataset: Dataset, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("restore")
    place = str(folder) if request.param == "local" else f"{request.getfixturevalue('bucket')}/restore"
    mp.spawn(rank_main, args=(str(folder), str(shared_storage), dataset, place), nprocs=2)
    return torch.load(folder / "out.pt", weights_only=True)


@pytest.mark.parametrize("kind", KINDS)
def test_all_ranks_get_the_newest_good_checkpoint(results: list[dict[str, Any]], kind: str) -> None:
    """The averages are the same to the bit, whether ranks share them or not (in `rank_main`)."""
    for rank, out in enumerate(results):
        checkpoint, same, images, groups = out[kind]
        assert (same, images) == (True, 2 * BATCH), checkpoint
        assert (groups == 0) == (kind != "fsdp2" and rank > 0)  # rank 0 alone reads replicated weights


def test_a_rank_opens_the_files_with_its_rows_alone(tmp_path: Path) -> None:
    """Of eight files a rank of eight needs its own, and the first for what is not sliced; one of two needs four."""
    whole = torch.arange(64.0).reshape(64, 1)
    for rank in range(8):
        tensors = {"w": whole[8 * rank : 8 * rank + 8], "n": torch.tensor(5)}
        write_group(str(tmp_path), "model", tensors, {"w": Slice(8 * rank, 64)}, rank, 8)
    for rank in (1, 2, 3, 6, 7):
        (tmp_path / f"model.{rank:05d}-of-00008.safetensors").write_bytes(b"not opened")
    names = [f"model.{rank:05d}-of-00008.safetensors" for rank in range(8)]
    for first, last in ((0, 8), (32, 40), (40, 48), (4 * 8, 6 * 8), (10, 10)):
        found = read_group(str(tmp_path), "model", lambda name, _, f=first, t=last: (f, t) if name == "w" else None,
                           files=names)  # fmt: skip
        assert torch.equal(found["w"], whole[first:last])
        assert found["n"] == 5


def test_a_snapshot_takes_the_memory_of_the_one_before(shared_storage: Path, dataset: Dataset) -> None:
    of, buffer = learner(shared_storage, dataset), saving.HostBuffer()
    of.step(batches(dataset, 1)[0])
    first = saving.snapshot(of, {}, 0, buffer)
    second = saving.snapshot(of, {}, 0, buffer)
    assert first is not None
    assert second is not None
    for group, held in first.groups.items():
        for name, tensor in held.tensors.items():
            assert tensor.data_ptr() == second.groups[group].tensors[name].data_ptr()
    weights = dict(of.model.named_parameters())
    assert all(torch.equal(second.groups["model"].tensors[name], p.detach()) for name, p in weights.items())


def test_tensors_of_an_object_store_are_fetched_together(bucket: str) -> None:
    """A model has a thousand tensors, and each was a request."""
    from diffscale.training.checkpoint import tensors as tensor_files

    whole = {f"layer{i:03d}/w": torch.randn(8, 100) for i in range(50)}
    step = {f"layer{i:03d}/step": torch.tensor(float(i)) for i in range(50)}
    write_group(bucket, "many", whole | step, {name: Slice(0, 16) for name in whole}, 0, 2)
    write_group(bucket, "many", whole | step, {name: Slice(8, 16) for name in whole}, 1, 2)
    requests = 0

    class Counting:
        def __init__(self, file: Any) -> None:
            self.file, self.size = file, file.size

        def read_at(self, count: int, offset: int) -> bytes:
            nonlocal requests
            requests += 1
            return self.file.read_at(count, offset)

    with tensor_files._reader(f"{bucket}/many.00000-of-00002.safetensors") as remote:
        counted = tensor_files._Remote(Counting(remote.file))
        counted.fetch({name: None if name in step else (8, 8) for name in (*whole, *step)})  # nothing but the steps
        assert all(torch.equal(counted.get_tensor(name), step[name]) for name in step)
    assert requests == 3  # the header's length, the header, the steps
    found = read_group(bucket, "many", lambda name, _: (8, 16) if name in whole else None)
    assert all(torch.equal(found[name], tensor) for name, tensor in (whole | step).items())
