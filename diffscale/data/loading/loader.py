"""Batches for training: gathered in the background, moved to the device, normalised, flipped and augmented there."""

from __future__ import annotations

import math
import queue
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from diffscale.core.errors import UserError
from diffscale.data.format.checksums import Verification
from diffscale.data.format.dataset import Dataset
from diffscale.data.format.errors import ShardError
from diffscale.data.loading.augment import augment_images, flip_images
from diffscale.data.loading.order import first_use, positions_to_indices
from diffscale.data.loading.prefetch import FetchAhead, check_cache
from diffscale.kernels.openmp import one_thread_here

ORDER_CHUNK = 8192  # positions whose rows are computed at a time
MOST_TOGETHER = 16
TOGETHER_BYTES = 4 << 20  # of small batches that go to the reader at once: waking a thread costs as much


Stored = tuple[NDArray[np.int64], Tensor, Tensor]


@dataclass(frozen=True)
class Batch:
    """This worker's share of one global batch.

    images: float32 (B, C, H, W) in [-1, 1] on the device (latents: their own values; `raw`: as stored, uint8
    (B, H, W, C)). labels: int64 (B,), zeros where the data has no classes. positions: int64 (B,) on the device.
    augment_label: float32 (B, 9), what the augmentation did, or None when it is off.
    """

    images: Tensor
    labels: Tensor
    positions: Tensor
    augment_label: Tensor | None = None

    def __len__(self) -> int:
        return len(self.positions)


class Way:
    """From the loader's thread to the reader: groups of batches, an error, or None at the end; so many ahead at most.

    Two simple queues, one of them of places that are free: queue.Queue wakes each side twice as often, and a waking
    costs more than a small batch does.
    """

    def __init__(self, places: int) -> None:
        self.closed = False
        self._ready: queue.SimpleQueue[list[Batch] | BaseException | None] = queue.SimpleQueue()
        self._free: queue.SimpleQueue[None] = queue.SimpleQueue()
        for _ in range(places):
            self._free.put(None)

    def put(self, item: list[Batch] | BaseException | None) -> None:
        """Waits for a place; does nothing once the way is closed."""
        self._free.get()
        if not self.closed:
            self._ready.put(item)

    def take(self) -> list[Batch] | BaseException | None:
        item = self._ready.get()
        self._free.put(None)
        return item

    def close(self) -> None:
        """The reader has gone: `put` waits no longer."""
        self.closed = True
        for _ in range(3):  # what the thread may still put: a group, the rest, the end
            self._free.put(None)


class Loader:
    """Iterates the share [first, last) of every global batch, from image `start` on, without end (or to `stop`).

        loader = Loader(dataset, seed=0, global_batch=256, start=images_seen, shard=(0, 128), device="cuda", flip=True)
        for batch in loader:              # positions start + k*256 + (0 .. 127), k = 0, 1, 2, ...
            ...
            images_seen += 256            # all that a resumed run needs

    dataset: from `open_dataset`. seed: of order, flips and augmentations. global_batch: images of a step over all
    workers. start: images seen so far, any number; the same start gives the same batches on any world size. shard:
    (first, last) places of this worker in the global batch, 0 <= first <= last <= global_batch; shares may be uneven
    or empty; None is all. `even_share` gives the usual one. stop: end before this position; a last partial batch is
    given, cut to the positions below `stop`.
    flip: mirror each image with probability 1/2. augment: probability of each of EDM's non-leaking augmentations
    (0 is off); then `augment_label` is set, and the mirroring is part of it. Both are keyed by (seed, position).
    order, block_rows, window: the form of the permutation (diffscale.data.loading.order), the dataset's own by default. raw:
    leave the images as stored. prefetch: batches prepared ahead, or a group of small ones. verify: check the shards'
    checksums in the background, once per node.

    One thread gathers, moves and transforms ahead of the reader; what goes wrong there is raised from the iteration.
    `close()` (or leaving `with loader:`) ends the thread. Iterating again starts from `start` again.
    """

    def __init__(
        self,
        dataset: Dataset,
        *,
        seed: int,
        global_batch: int,
        start: int = 0,
        stop: int | None = None,
        shard: tuple[int, int] | None = None,
        device: str | torch.device = "cpu",
        flip: bool = False,
        augment: float = 0.0,
        order: Literal["rows", "blocks"] = "rows",
        block_rows: int | None = None,
        window: int | None = None,
        raw: bool = False,
        prefetch: int = 3,
        verify: bool = True,
    ) -> None:
        first, last = shard if shard is not None else (0, global_batch)
        if global_batch < 1 or start < 0 or prefetch < 1:
            raise ValueError(f"global_batch = {global_batch}, start = {start}, prefetch = {prefetch}: at least 1, 0, 1")
        if not 0 <= first <= last <= global_batch:
            raise ValueError(f"shard = {shard}: 0 <= first <= last <= global_batch = {global_batch}")
        if dataset.is_latent and (flip or augment):
            raise UserError(
                setting="data.flip" if flip else "data.augment",
                value=flip or augment,
                expected="off for a dataset of latents: a mirrored latent is not the latent of the mirrored image",
                fix="data.flip=false data.augment=0",
            )
        self.dataset, self.seed, self.global_batch, self.start, self.stop = dataset, seed, global_batch, start, stop
        self.first, self.last, self.device = first, last, torch.device(device)
        self.flip, self.augment, self.raw, self.prefetch = flip, augment, raw, prefetch
        self.form: dict[str, Any] = {
            "order": order,
            "block_rows": block_rows or dataset.block_rows,
            "window": window or dataset.window,
        }
        self.verification = Verification(dataset) if verify else None
        check_cache(dataset, self.form)
        self._threads: list[tuple[threading.Thread, Way]] = []

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __iter__(self) -> Iterator[Batch]:
        if self.verification is not None:
            self.verification.start()
        way = Way(max(1, self.prefetch // self._together))
        thread = threading.Thread(target=self._work, args=(way,), name="diffscale-loader", daemon=True)
        self._threads.append((thread, way))
        thread.start()
        try:
            while (item := way.take()) is not None:
                if isinstance(item, BaseException):
                    raise item
                for batch in item:
                    self._raise_damage()
                    if self.device.type == "cuda":
                        self._take_over(batch)
                    yield batch
        finally:
            way.close()

    def close(self) -> None:
        """Ends the background threads and waits for them."""
        while self._threads:
            thread, way = self._threads.pop()
            way.close()
            thread.join(timeout=10)

    def wait_verified(self) -> None:
        """Waits until every checksum of the dataset was compared; call it before the first checkpoint counts as good.

        Raises ShardError naming the damaged shard and the first position of the run that used it.
        """
        if self.verification is not None:
            self.verification.wait()
            self._raise_damage()

    def _raise_damage(self) -> None:
        damage = self.verification.damage if self.verification is not None else None
        if damage is None:
            return
        error, rows = damage
        seen = self.start + 1000 * self.global_batch
        position = None if rows is None else first_use(rows, self.dataset.n, self.seed, 0, seen, **self.form)
        raise ShardError(error.shard, error.problem, position=position)

    def _work(self, way: Way) -> None:
        made: list[Batch] = []
        try:
            one_thread_here()
            stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
            with torch.cuda.stream(stream):
                for stored in self._stored(stream is not None):
                    if way.closed:
                        return
                    made.append(self._make(stored, stream))
                    if len(made) == self._together:
                        way.put(made)
                        made = []
            way.put(made)
            way.put(None)
        except BaseException as error:
            way.put(made)
            way.put(error)

    def _plan(self) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
        """Positions and rows of this worker's share of some batches, (batches, share); the order is evaluated many
        batches at a time."""
        share = np.arange(self.first, self.last, dtype=np.int64)
        most = 2 * self.dataset.n // self.global_batch  # an epoch has a permutation of its own to set up
        steps = max(1, min(ORDER_CHUNK // max(1, len(share)), most))
        base = self.start
        while self.stop is None or base < self.stop:
            starts = base + np.arange(steps, dtype=np.int64) * self.global_batch
            if self.stop is not None:
                starts = starts[starts < self.stop]
            positions = starts[:, None] + share
            indices = positions_to_indices(positions, self.dataset.n, self.seed, **self.form)
            for first in range(0, len(starts), self._together):
                group = slice(first, first + self._together)
                yield positions[group], indices[group]
            base += len(starts) * self.global_batch

    @cached_property
    def _together(self) -> int:
        """Batches that are gathered and go to the reader together: small ones share what that costs."""
        if self.dataset.manifest.layout == "encoded":  # which take long to decode
            return 1
        image = math.prod(self.dataset.image_shape) * np.dtype(self.dataset.dtype).itemsize
        return min(MOST_TOGETHER, max(1, TOGETHER_BYTES // max(1, image * (self.last - self.first))))

    def _stored(self, pinned: bool) -> Iterator[Stored]:
        """Positions, images as stored and labels of each batch; images in pinned memory where that is asked for."""
        dtype = getattr(torch, self.dataset.dtype)
        remote = self.dataset.cache is not None
        ahead = FetchAhead(self.dataset, self.seed, self.start, self.form) if remote else None
        try:
            for positions, indices in self._plan():
                if ahead is not None and positions.size:
                    ahead.reach(int(positions[0, 0]))
                sizes = [len(batch) for batch in positions]
                if self.stop is not None:
                    sizes[-1] = int(np.searchsorted(positions[-1], self.stop))
                images = torch.empty((sum(sizes), *self.dataset.image_shape), dtype=dtype, pin_memory=pinned)
                images, labels = self.dataset.gather(indices.reshape(-1)[: len(images)], out=images)
                for place, x, label in zip(positions, images.split(sizes), labels.split(sizes), strict=True):
                    yield place[: len(x)], x, label
        finally:
            if ahead is not None:
                ahead.close()

    def _make(self, found: Stored, stream: torch.cuda.Stream | None) -> Batch:
        positions, stored, labels = torch.from_numpy(found[0]), found[1], found[2]
        if stream is not None:  # from pageable memory the copy would wait for the device
            labels, positions = labels.pin_memory(), positions.pin_memory()
        images = stored.to(self.device, non_blocking=True)
        positions = positions.to(self.device, non_blocking=True)
        labels = labels.to(self.device, non_blocking=True)
        batch = Batch(images, labels, positions) if self.raw else self._transform(images, labels, positions)
        if stream is not None:
            stream.synchronize()  # this thread waits, not the reader
        return batch

    def _transform(self, images: Tensor, labels: Tensor, positions: Tensor) -> Batch:
        if self.dataset.is_latent:
            return Batch(images.float(), labels, positions)
        if self.flip and not self.augment:  # while it is one byte for each value
            images = flip_images(images, self.seed, positions, dim=2)
        x = images.permute(0, 3, 1, 2).contiguous().float().mul_(1 / 127.5).sub_(1)
        if not self.augment:
            return Batch(x, labels, positions)
        x, label = augment_images(x, self.seed, positions, self.augment, flip=self.flip)
        return Batch(x, labels, positions, label)

    def _take_over(self, batch: Batch) -> None:
        """Tells the allocator that the reader's stream uses these tensors, made on the loader's."""
        stream = torch.cuda.current_stream(self.device)
        for tensor in (batch.images, batch.labels, batch.positions, batch.augment_label):
            if tensor is not None:
                tensor.record_stream(stream)


def create_loader(kind: Literal["arrow", "ray_data"], dataset: Dataset, **settings: Any) -> Loader:
    """The loader of `data.loader`; both take the arguments of Loader and give the same batches."""
    if kind == "arrow":
        return Loader(dataset, **settings)
    from diffscale.data.loading.ray_loader import RayDataLoader  # the only loader that needs Ray

    return RayDataLoader(dataset, **settings)


def even_share(global_batch: int, rank: int, world_size: int) -> tuple[int, int]:
    """(first, last) of a worker's share; shares differ by at most one image when the batch does not divide."""
    return rank * global_batch // world_size, (rank + 1) * global_batch // world_size
