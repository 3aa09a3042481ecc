"""Writes checkpoints in the background: `snapshot` copies between two steps, a thread of `Saver` makes it durable."""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diffscale.core import storage
from diffscale.core.hashing import Digest, digest_of
from diffscale.training.checkpoint import layout as ck
from diffscale.training.checkpoint.state import (
    Slice,
    flatten_optimizer,
    local_rows,
    local_shard,
    optimizer_rows,
    optimizer_slices,
    restore_optimizer,
    row_slice,
)
from diffscale.training.checkpoint.tensors import read_group, write_group
from diffscale.training.learner import Learner

log = logging.getLogger(__name__)

RETRY_SECONDS = (1.0, 4.0, 16.0)
SHARD_WAIT_SECONDS = 300.0


class StorageFailed(Exception):
    """A checkpoint could not be written after several tries; earlier ones are untouched."""


@dataclass(frozen=True)
class Snapshot:
    """This rank's part of a checkpoint, copied to the CPU."""

    images_seen: int
    groups: dict[str, tuple[dict[str, Tensor], dict[str, Slice | None]]]
    state: dict[str, Any]


def snapshot(learner: Learner, state: dict[str, Any], rank: int) -> Snapshot | None:
    """Copy this rank's part of a checkpoint, or return None if the rank writes nothing.

    Blocks only while copying to host memory.

    state: further content of state.json, plain JSON values
    """
    if rank and not learner.sharded:
        return None
    parameters = dict(learner.model.named_parameters())
    model = learner.model.state_dict()
    groups = {"model": ({n: _copy(t) for n, t in model.items()}, {n: row_slice(t) for n, t in model.items()})}
    for name, average in learner.ema.averages.items():
        places = {n: row_slice(parameters[n]) for n in average}
        groups[f"ema/{name}"] = ({n: _copy(t) for n, t in average.items()}, places)
    tensors, numbers = flatten_optimizer(learner.optimizer, learner.model)
    places = optimizer_slices(tensors, learner.model)
    groups["optimizer/state"] = ({n: _copy(t) for n, t in tensors.items()}, places)
    return Snapshot(learner.images_seen, groups, state | learner.scalars() | {"optimizer": numbers})


def restore(learner: Learner, checkpoint: str) -> dict[str, Any]:
    """Load a checkpoint into a learner of any world size and return state.json. Each rank reads its own rows.

    Raises CheckpointDamaged.
    """
    state = ck.read_state(checkpoint)
    model = learner.model.state_dict()
    parameters = dict(learner.model.named_parameters())
    with torch.no_grad():
        weights = read_group(checkpoint, "model", lambda name, _: local_rows(model[name]))
        for name, target in model.items():
            local_shard(target).copy_(weights[name])
        for name, average in learner.ema.averages.items():
            stored = read_group(checkpoint, f"ema/{name}", lambda name, _: local_rows(parameters[name]))
            for key, mine in average.items():
                mine.copy_(stored[key])
    tensors = {}
    if state["images_seen"]:
        tensors = read_group(checkpoint, "optimizer/state", optimizer_rows(learner.model))
    restore_optimizer(learner.optimizer, learner.model, tensors, state["optimizer"])
    learner.load_scalars(state)
    return state


def _copy(tensor: Tensor) -> Tensor:
    return local_shard(tensor).detach().to("cpu", copy=True)


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

        attempt: unique to this launch of the workers, so that rank 0 ignores the shards of an earlier launch
        settings: content of experiment.yaml
        finished: called in the thread with the images seen of each completed checkpoint
        before: called in the thread before a checkpoint is completed, to make durable what belongs to it
        """
        self.run_folder, self.rank, self.size, self.attempt = run_folder, rank, size, attempt
        self.settings, self.before, self.finished = settings, before, finished
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
            for group, (tensors, slices) in snapshot.groups.items():
                files |= write_group(uri, group, tensors, slices, self.rank, self.size)
            if self.rank:
                storage.write_bytes(self._shard_list(uri, self.rank), self._listed(files))
                return
            for name, data in (
                ("state.json", json.dumps(snapshot.state, indent=1).encode()),
                ("experiment.yaml", self.settings),
            ):
                storage.write_bytes(storage.join(uri, name), data)
                files[name] = digest_of(storage.join(uri, name))
            if any(any(slices.values()) for _, slices in snapshot.groups.values()):
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
