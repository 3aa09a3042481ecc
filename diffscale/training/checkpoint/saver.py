"""Writes checkpoints in the background: `snapshot` copies between two steps, a thread of `Saver` makes it durable."""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from diffscale.core import storage
from diffscale.core.hashing import Digest, digest_of
from diffscale.training.checkpoint import layout as ck
from diffscale.training.checkpoint.state import (
    Slice,
    flatten_optimizer,
    local_shard,
    optimizer_slices,
    part_of,
    row_slice,
)
from diffscale.training.checkpoint.tensors import write_group
from diffscale.training.learner import Learner

log = logging.getLogger(__name__)

RETRY_SECONDS = (1.0, 4.0, 16.0)
ALIGNMENT = 64  # bytes
UPLOADS = 4  # groups of tensors written at once
SHARD_WAIT_SECONDS = 300.0


class StorageFailed(Exception):
    """A checkpoint could not be written after several tries; earlier ones are untouched."""


class Group(NamedTuple):
    """What this rank writes of a group of tensors: rows, their places in the full tensors, and how many ranks write."""

    tensors: dict[str, Tensor]
    slices: dict[str, Slice | None]
    writers: int


@dataclass(frozen=True)
class Snapshot:
    """This rank's part of a checkpoint, copied to the CPU."""

    images_seen: int
    groups: dict[str, Group]
    state: dict[str, Any]


class HostBuffer:
    """Host memory for one snapshot, reused by the next; pinned for tensors on a GPU, which then copies at full speed.

    Copies from pageable memory, tensor by tensor, held all GPUs for seconds at every checkpoint.
    """

    def __init__(self) -> None:
        self._memory = torch.empty(0, dtype=torch.uint8)

    def copy(self, tensors: list[Tensor]) -> list[Tensor]:
        """Return copies of tensors, which stay valid until the next call."""
        sizes = [-(-t.numel() * t.element_size() // ALIGNMENT) * ALIGNMENT for t in tensors]
        on_gpu = any(t.is_cuda for t in tensors)
        if sum(sizes) != len(self._memory):
            self._memory = torch.empty(0, dtype=torch.uint8)  # the old one goes first
            self._memory = torch.empty(sum(sizes), dtype=torch.uint8, pin_memory=on_gpu)
        copies = []
        for t, part in zip(tensors, self._memory.split(sizes), strict=True):
            used = part[: t.numel() * t.element_size()]
            copies.append(used.view(t.dtype).view(t.shape).copy_(t, non_blocking=True))
        if on_gpu:
            torch.cuda.current_stream().synchronize()
        return copies


def snapshot(learner: Learner, state: dict[str, Any], rank: int, buffer: HostBuffer | None = None) -> Snapshot | None:
    """Copy this rank's part of a checkpoint, or return None if the rank writes nothing.

    Blocks only while copying to host memory.

    state: further content of state.json, plain JSON values
    buffer: where to copy to; the snapshot before it must be written
    """
    if rank >= learner.holders:
        return None
    parameters = dict(learner.model.named_parameters())
    model = learner.model.state_dict()
    tensors, numbers = flatten_optimizer(learner.optimizer, learner.model)
    groups = {
        "model": _group(learner, model, {n: row_slice(t) for n, t in model.items()}, rank),
        "optimizer/state": _group(learner, tensors, optimizer_slices(tensors, learner.model), rank),
    }
    for name, average in learner.ema.averages.items():
        if learner.ema.shared_by is None:
            groups[f"ema/{name}"] = _group(learner, average, {n: row_slice(parameters[n]) for n in average}, rank)
        else:
            places = {n: part_of(parameters[n], rank, learner.holders)[1] for n in average}
            groups[f"ema/{name}"] = Group(average, places, learner.holders)
    groups = {name: group for name, group in groups.items() if rank < group.writers}
    held = [local_shard(t).detach() for group in groups.values() for t in group.tensors.values()]
    copies = iter((buffer or HostBuffer()).copy(held))
    copied = {name: group._replace(tensors={n: next(copies) for n in group.tensors}) for name, group in groups.items()}
    return Snapshot(learner.images_seen, copied, state | learner.scalars() | {"optimizer": numbers})


def _group(learner: Learner, tensors: dict[str, Tensor], slices: dict[str, Slice | None], rank: int) -> Group:
    """Return this rank's part of tensors that it holds whole, or of which it holds the rows at `slices`."""
    if not learner.sharded and learner.writers > 1:
        parts = {n: part_of(t, rank, learner.writers) for n, t in tensors.items()}
        tensors, slices = {n: t for n, (t, _) in parts.items()}, {n: place for n, (_, place) in parts.items()}
    return Group(tensors, slices, learner.writers)


class Saver:
    """Writes the snapshots of one run in a thread, one at a time. Every rank has one; that of rank 0 completes them."""

    def __init__(
        self,
        run_folder: str,
        rank: int,
        size: int,
        attempt: str,
        settings: bytes,
        finished: Callable[[int], None],
        before: Callable[[], None] = lambda: None,
    ) -> None:
        """Set up; nothing is written yet.

        size: number of workers that write parts, from rank 0 on
        attempt: unique to this launch of the workers, so that rank 0 ignores the shards of an earlier launch
        settings: content of experiment.yaml
        finished: called in the thread with the images seen of each completed checkpoint
        before: called in the thread before a checkpoint is completed, to make durable what belongs to it
        """
        self.run_folder, self.rank, self.size, self.attempt = run_folder, rank, size, attempt
        self.settings, self.before, self.finished = settings, before, finished
        self.buffer = HostBuffer()  # for the snapshots that are saved here
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def save(self, snapshot: Snapshot | None) -> None:
        """Start writing a snapshot once the previous one is written. Raises StorageFailed if that failed."""
        self.wait()
        if snapshot is not None:
            self._thread = threading.Thread(target=self._run, args=(snapshot,), daemon=True, name="checkpoint")
            self._thread.start()

    def wait(self) -> None:
        """Wait until nothing is being written. Raises StorageFailed."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self.check()

    def check(self) -> None:
        """Raise StorageFailed if the last snapshot could not be written, without waiting for one in progress."""
        if self._error is not None:
            error, self._error = self._error, None
            raise StorageFailed(str(error)) from error

    def _run(self, snapshot: Snapshot) -> None:
        for attempt, pause in enumerate([*RETRY_SECONDS, None]):
            try:
                self._write(snapshot)
                return
            except Exception as error:
                uri = ck.folder_of(self.run_folder, snapshot.images_seen)
                log.warning("checkpoint %s, attempt %d: %s", uri, attempt + 1, error)
                if pause is None:
                    self._error = error
                    return
                time.sleep(pause)

    def _write(self, snapshot: Snapshot) -> None:
        uri = ck.folder_of(self.run_folder, snapshot.images_seen)
        if storage.exists(storage.join(uri, ck.COMPLETE)):  # by an earlier launch
            return
        try:
            files: dict[str, Digest] = {}
            with ThreadPoolExecutor(UPLOADS, thread_name_prefix="checkpoint") as pool:  # one stream is slow

                def write(group: str) -> dict[str, Digest]:
                    tensors, slices, writers = snapshot.groups[group]
                    return write_group(uri, group, tensors, slices, self.rank, writers)

                for written in pool.map(write, snapshot.groups):
                    files |= written
            if self.rank:
                storage.write_bytes(self._shard_list(uri, self.rank), self._listed(files))
                return
            for name, data in (
                ("state.json", json.dumps(snapshot.state, indent=1).encode()),
                ("experiment.yaml", self.settings),
            ):
                storage.write_bytes(storage.join(uri, name), data)
                files[name] = digest_of(storage.join(uri, name))
            if any(any(group.slices.values()) for group in snapshot.groups.values()):
                for rank in range(1, self.size):
                    files |= self._await(uri, rank)
            self.before()
            ck.complete(uri, files)
        except Exception:
            if not self.rank:
                ck.delete_partial(uri)  # frees its space; other checkpoints stay untouched
            raise
        self.finished(snapshot.images_seen)

    def _shard_list(self, uri: str, rank: int) -> str:
        return storage.join(uri, f"shards-{rank:05d}.json")

    def _listed(self, files: dict[str, Digest]) -> bytes:
        return json.dumps({"attempt": self.attempt, "files": {n: list(i) for n, i in files.items()}}).encode()

    def _await(self, uri: str, rank: int) -> dict[str, Digest]:
        """Wait for the files of another rank and return their digests."""
        end = time.monotonic() + SHARD_WAIT_SECONDS
        while time.monotonic() < end:
            try:
                data = json.loads(storage.read_bytes(self._shard_list(uri, rank)))
                if data["attempt"] == self.attempt:
                    return {name: Digest(*info) for name, info in data["files"].items()}
            except FileNotFoundError:
                pass
            time.sleep(0.1)
        raise TimeoutError(f"rank {rank} did not write its shards of {uri} within {SHARD_WAIT_SECONDS:.0f} s")
