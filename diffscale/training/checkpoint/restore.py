"""Restoring a run from its newest undamaged checkpoint, on all ranks together, reading each byte once.

Replicated weights: rank 0 reads and verifies, and broadcasts tensor by tensor. With FSDP2 the ranks share the work:
each verifies its part of the files, and takes its own rows from them. From an object store a file is verified while it
is copied to the node's disk, from where its tensors are then read.
"""

from __future__ import annotations

import hashlib
import logging
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffscale.core import storage
from diffscale.core.cache import cache_dir
from diffscale.core.hashing import CHUNK, Digest
from diffscale.training.checkpoint import layout as ck
from diffscale.training.checkpoint.state import local_rows, local_shard, optimizer_rows, restore_optimizer
from diffscale.training.checkpoint.tensors import CheckpointDamaged, Rows, read_group
from diffscale.training.learner import Learner
from diffscale.training.parallel import World

log = logging.getLogger(__name__)


def restore_newest(learner: Learner, run_folder: str, world: World) -> tuple[str, dict[str, Any]] | None:
    """Load the newest good checkpoint of a run into the learner of every rank (a collective call).

    Returns the checkpoint and its state.json, or None if there is no good one. The log names each damaged checkpoint
    that is skipped, and those after the good one are unpublished: training writes them again.
    """
    candidates = world.from_first(ck.list_checkpoints(run_folder)[::-1] if world.rank == 0 else None)
    for checkpoint in candidates:
        files = world.from_first(_files_for_resuming(checkpoint) if world.rank == 0 else None)
        if files is None:
            continue
        with _staging(checkpoint) as staged:
            mine = _part_of(files, world) if learner.sharded else files if world.rank == 0 else {}
            problem = _verified(checkpoint, mine, staged)
            problems = [found for found in world.gather(problem) if found]
            if not problems:
                if world.rank == 0:
                    ck.invalidate_checkpoints_from(run_folder, ck.images_of(checkpoint))
                return checkpoint, restore(learner, checkpoint, world, staged, list(files))
        if world.rank == 0:
            log.warning("skipped a damaged checkpoint, using the one before it: %s", problems[0])
    if world.rank == 0:
        ck.invalidate_checkpoints_from(run_folder, -1)
    return None


def restore(
    learner: Learner,
    checkpoint: str,
    world: World | None = None,
    staged: str | None = None,
    files: list[str] | None = None,
) -> dict[str, Any]:
    """Load a checkpoint into a learner of any world size and return state.json.

    world: with replicated weights rank 0 reads and broadcasts (a collective call); None: each rank reads for itself
    staged: local folder with copies of some of the files
    files: those of the checkpoint, if they are known

    Raises CheckpointDamaged.
    """
    world = world or World()
    alone = learner.sharded or world.rank == 0

    def group(name: str, rows: Rows) -> dict[str, Tensor]:
        own = rows if learner.sharded else None
        found = read_group(checkpoint, name, own, files=files, staged=staged) if alone else {}
        return found if learner.sharded else _broadcast(found, world)

    state = world.from_first(ck.read_state(staged or checkpoint) if world.rank == 0 else None)
    model = learner.model.state_dict()
    parameters = dict(learner.model.named_parameters())
    with torch.no_grad():
        weights = group("model", lambda name, _: local_rows(model[name]))
        for name, target in model.items():
            local_shard(target).copy_(weights[name])
        for name, average in learner.ema.averages.items():
            stored = group(f"ema/{name}", lambda name, _: local_rows(parameters[name]))
            for key, mine in average.items():
                mine.copy_(stored[key] if learner.sharded else learner.ema.own_rows(stored[key]))
    tensors = group("optimizer/state", optimizer_rows(learner.model)) if state["images_seen"] else {}
    restore_optimizer(learner.optimizer, learner.model, tensors, state["optimizer"])
    learner.load_scalars(state)
    return state


def _files_for_resuming(checkpoint: str) -> dict[str, Digest] | None:
    """Return the files of a checkpoint that has optimizer state, None for another or a damaged one."""
    try:
        files = ck.files_of(checkpoint)
    except CheckpointDamaged as error:
        log.warning("skipped a damaged checkpoint, using the one before it: %s", error)
        return None
    return files if any(name.startswith("optimizer/") for name in files) else None


def _part_of(files: dict[str, Digest], world: World) -> dict[str, Digest]:
    """Return the files that this rank verifies: those that a rank of its number wrote, if there were as many."""
    return {name: info for name, info in files.items() if (ck.writer_of(name) or 0) % world.size == world.rank}


def _verified(checkpoint: str, files: dict[str, Digest], staged: str | None) -> str:
    """Compare files with their checksums, copying them into `staged` meanwhile; return what is wrong, "" if nothing."""
    try:
        for name, info in files.items():
            if staged is None:
                ck.verify_file(checkpoint, name, info)
            else:
                _copy(checkpoint, name, info, Path(staged, name))
    except CheckpointDamaged as error:
        return str(error)
    return ""


def _copy(checkpoint: str, name: str, info: Digest, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    fs, path = storage.filesystem(storage.join(checkpoint, name))
    digest, count = hashlib.sha256(), 0
    try:
        with fs.open_input_stream(path) as source, open(target, "wb") as sink:
            while chunk := source.read(CHUNK):
                digest.update(chunk)
                count += len(chunk)
                sink.write(chunk)
    except FileNotFoundError as error:
        raise CheckpointDamaged(f"{checkpoint}/{name}: {error}") from None
    ck.check_digest(checkpoint, name, Digest(digest.hexdigest(), count), info)


@contextmanager
def _staging(checkpoint: str) -> Iterator[str | None]:
    """Yield a temporary folder on this node's disk for the files of a remote checkpoint, None for a local one."""
    if not storage.is_remote(checkpoint):
        yield None
        return
    place = cache_dir() / "checkpoints"
    place.mkdir(parents=True, exist_ok=True)
    folder = tempfile.mkdtemp(dir=place)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _broadcast(tensors: dict[str, Tensor], world: World) -> dict[str, Tensor]:
    """Return rank 0's tensors, on the CPU, on every rank."""
    if world.size == 1:
        return tensors
    out = {}
    for name, shape, dtype in world.from_first([(n, tuple(t.shape), t.dtype) for n, t in tensors.items()]):
        mine = tensors[name] if world.rank == 0 else torch.empty(shape, dtype=dtype)
        if mine.numel():  # as bytes: not every backend sends every type
            sent = mine.contiguous().reshape(-1).view(torch.uint8).to(world.device)
            world.broadcast(sent)
            mine = mine if world.rank == 0 else sent.cpu().view(dtype).reshape(shape)
        out[name] = mine
    return out
