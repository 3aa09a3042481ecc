"""Batches for training: gathered in the background, moved to the device, normalised, flipped and augmented there.

This is not torch's DataLoader: one process reads a shared memory map with threads, so batches cross no process and the
order needs no state.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from diffscale.core.errors import UserError
from diffscale.data.format.checksums import BackgroundCheck
from diffscale.data.format.dataset import Dataset
from diffscale.data.format.errors import ShardError
from diffscale.data.loading.augment import augment_images, is_mirrored, mirror_images
from diffscale.data.loading.batch_queue import BatchQueue
from diffscale.data.loading.latents import draw_latents
from diffscale.data.loading.order import Order, first_use, positions_to_indices
from diffscale.data.loading.prefetch import ShardPrefetcher, check_cache
from diffscale.kernels.runtime import single_threaded

ORDER_CHUNK = 8192  # positions whose rows are computed at once
MOST_GROUPED = 16
POSITIONS, LABELS, MIRRORED = "_positions", "_labels", "_mirrored"  # names of the loader's own numbers
GROUP_BYTES = 4 << 20  # of small batches that are passed on together: waking a thread costs as much as one

Stored = tuple[NDArray[np.int64], Tensor, Tensor]
Numbers = Mapping[str, Tensor]


@dataclass(frozen=True)
class Batch:
    """One worker's share of a global batch, on the device.

    images: float32 (B, C, H, W) in [-1, 1], or latents (loading/latents.py); with `raw`, as stored: uint8 (B, H, W, C)
    labels: int64 (B,), zeros for data without classes
    positions: int64 (B,), images since the start of the run
    augment_label: float32 (B, 9), the applied augmentation, or None if it is off
    numbers: (B,) each, what `numbers` of the loader returned for the positions; empty without it
    """

    images: Tensor
    labels: Tensor
    positions: Tensor
    augment_label: Tensor | None = None
    numbers: Numbers = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.positions)


class Loader:
    """Iterator over one worker's share of every global batch, from image `start` on.

        loader = Loader(dataset, seed=0, global_batch=256, start=images_seen, shard=(0, 128), device="cuda", flip=True)
        for batch in loader:              # positions start + k*256 + (0 .. 127), k = 0, 1, 2, ...
            ...
            images_seen += 256            # the whole state of the loader: a resumed run needs nothing else

    A background thread gathers, moves and transforms batches; its exceptions are raised from the iteration. `close()`,
    or leaving `with loader:`, ends the thread. A second iteration begins at `start` again.

    dataset: from `open_dataset`
    seed: of the order, the flips and the augmentations
    global_batch: images of a step over all workers
    start: images seen so far, any number; the same start gives the same batches on any number of workers
    stop: end before this position; the last batch holds the positions below it; None never ends
    shard: places of this worker in the global batch: a range, or (first, last) with 0 <= first <= last <= global_batch;
        shares may be uneven or empty (`even_share` and `lane_share` give the usual ones); None is the whole batch
    device: of the batches
    flip: mirror each image with probability 1/2, keyed by (seed, position)
    augment: probability of each of EDM's non-leaking augmentations, keyed by (seed, position), 0 is off; the
        mirroring is then one of them, and batches have an `augment_label`
    order: `rows` permutes all rows, `blocks` permutes blocks and then the rows in a window of blocks, `lanes` does so
        in each lane (loading/order.py)
    block_rows: rows of a block; None is the dataset's own
    window: blocks in a window; None is the dataset's own
    lanes: number of lanes of `order=lanes`
    node_workers: workers of this node, which share its cache
    channels_last: images (B, C, H, W) in the memory order in which they are stored, as convolutions on a GPU take them
    raw: leave the images as stored
    numbers: returns further tensors, one row for each of the positions int64 (n,); called on the CPU, in the
        background and for many batches at once, because a GPU needs as long for one batch as for all of them
    prefetch: batches, or groups of small batches, prepared ahead
    verify: compare the checksums of shards in the background as they are first used, once per node
    """

    def __init__(
        self,
        dataset: Dataset,
        *,
        seed: int,
        global_batch: int,
        start: int = 0,
        stop: int | None = None,
        shard: range | tuple[int, int] | None = None,
        device: str | torch.device = "cpu",
        flip: bool = False,
        augment: float = 0.0,
        order: Order = "rows",
        block_rows: int | None = None,
        window: int | None = None,
        lanes: int = 1024,
        node_workers: int = 1,
        channels_last: bool = False,
        raw: bool = False,
        numbers: Callable[[Tensor], Numbers] | None = None,
        prefetch: int = 3,
        verify: bool = True,
    ) -> None:
        share = shard if isinstance(shard, range) else range(*(shard or (0, global_batch)))
        if global_batch < 1 or start < 0 or prefetch < 1:
            raise ValueError(f"global_batch = {global_batch}, start = {start}, prefetch = {prefetch}: at least 1, 0, 1")
        if not 0 <= share.start <= share.stop <= global_batch or share.step < 1:
            raise ValueError(f"shard = {shard}: 0 <= first <= last <= global_batch = {global_batch}")
        mirrors = dataset.encoding is not None and dataset.encoding.mirrored
        if dataset.is_latent and (augment or (flip and not mirrors)):
            raise UserError(
                setting="data.augment" if augment else "data.flip",
                value=augment or flip,
                expected="off for a dataset of latents: a mirrored latent is not the latent of the mirrored image",
                fix="data.flip=false data.augment=0; or data build --encode VAE --mirror, for data.flip",
            )
        self.dataset, self.seed, self.global_batch, self.start, self.stop = dataset, seed, global_batch, start, stop
        self.share, self.device = np.arange(share.start, share.stop, share.step), torch.device(device)
        self.flip, self.augment, self.raw, self.prefetch = flip, augment, raw, prefetch
        self.channels_last = channels_last
        self.numbers = numbers
        self.form: dict[str, Any] = {
            "order": order,
            "block_rows": block_rows or dataset.block_rows,
            "window": window or dataset.window,
            "lanes": lanes,
        }
        self._reached = start  # the last position that was gathered
        self.checks = BackgroundCheck(dataset) if verify else None
        check_cache(dataset, self.form, node_workers * len(self.share) / global_batch)
        self._threads: list[tuple[threading.Thread, BatchQueue[Batch]]] = []

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __iter__(self) -> Iterator[Batch]:
        batches: BatchQueue[Batch] = BatchQueue(max(1, self.prefetch // self._group_size))
        thread = threading.Thread(target=self._work, args=(batches,), name="diffscale-loader", daemon=True)
        self._threads.append((thread, batches))
        thread.start()
        try:
            while (item := batches.get()) is not None:
                if isinstance(item, BaseException):
                    raise item
                for batch in item:
                    self._raise_damage()
                    if self.device.type == "cuda":
                        self._use_on_current_stream(batch)
                    yield batch
        finally:
            batches.close()

    def close(self) -> None:
        """End the background threads and wait for them."""
        while self._threads:
            thread, batches = self._threads.pop()
            batches.close()
            thread.join(timeout=10)

    def wait_verified(self, everything: bool = True) -> None:
        """Wait until every checksum of the dataset was compared, or those of the shards that this loader has used.

        Call it before a checkpoint counts as good. Raises ShardError naming the damaged shard and the first position of
        the run that used it.
        """
        if self.checks is not None:
            self.checks.wait(everything)
            self._raise_damage()

    def _verify_used(self, indices: NDArray[np.int64]) -> None:
        """Have the checksums of the shards of these rows compared in the background."""
        if self.checks is not None and indices.size:
            shards = np.searchsorted(self.dataset.starts, indices.reshape(-1), side="right") - 1
            self.checks.use(np.unique(shards).tolist())

    def _raise_damage(self) -> None:
        damage = self.checks.damage if self.checks is not None else None
        if damage is None:
            return
        error, rows = damage
        seen = max(self._reached, self.start + 1000 * self.global_batch)
        position = first_use(rows, self.dataset.n, self.seed, 0, seen, **self.form)
        raise ShardError(error.shard, error.problem, position=position)

    def _work(self, batches: BatchQueue[Batch]) -> None:
        made: list[Batch] = []
        try:
            single_threaded()
            stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
            with torch.cuda.stream(stream):
                for stored, drawn in zip(self._stored(stream is not None), self._drawn(), strict=False):
                    if batches.closed:
                        return
                    made.append(self._make(stored, drawn, stream))
                    if len(made) == self._group_size:
                        batches.put(made)
                        made = []
            batches.put(made)
            batches.put(None)
        except BaseException as error:
            batches.put(made)
            batches.put(error)

    def _plan(self) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
        """Yield positions and rows of this worker's share of some batches, both (batches, share).

        The order is evaluated for many batches at once."""
        most = 2 * self.dataset.n // self.global_batch  # each epoch has its own permutation to set up
        steps = max(1, min(ORDER_CHUNK // max(1, len(self.share)), most))
        base = self.start
        while self.stop is None or base < self.stop:
            starts = base + np.arange(steps, dtype=np.int64) * self.global_batch
            if self.stop is not None:
                starts = starts[starts < self.stop]
            positions = starts[:, None] + self.share
            indices = positions_to_indices(positions, self.dataset.n, self.seed, **self.form)
            for first in range(0, len(starts), self._group_size):
                group = slice(first, first + self._group_size)
                yield positions[group], indices[group]
            base += len(starts) * self.global_batch

    @cached_property
    def _group_size(self) -> int:
        """Number of batches that are gathered and passed on together: small batches share the cost of a wake-up."""
        if self.dataset.manifest.layout == "encoded":  # decoding takes much longer than a wake-up
            return 1
        image = math.prod(self.dataset.image_shape) * np.dtype(self.dataset.dtype).itemsize
        return min(MOST_GROUPED, max(1, GROUP_BYTES // max(1, image * len(self.share))))

    def _stored(self, pinned: bool) -> Iterator[Stored]:
        """Yield positions, stored images and labels of each batch; `pinned` puts the images in pinned memory."""
        dtype = getattr(torch, self.dataset.dtype)
        remote = self.dataset.cache is not None
        own = (self.seed, self.start, self.share, self.global_batch)
        ahead = ShardPrefetcher(self.dataset, *own, self.form) if remote and len(self.share) else None
        try:
            for positions, indices in self._plan():
                if ahead is not None and positions.size:
                    ahead.advance(int(positions[0, 0]))
                self._reached = int(positions.max(initial=self.start))
                self._verify_used(indices)
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

    def _drawn(self) -> Iterator[dict[str, Tensor]]:
        """Yield the numbers of the positions of each batch, drawn for many batches at once; without an end."""
        share = torch.from_numpy(self.share)
        steps = max(1, ORDER_CHUNK // max(1, len(share)))
        base = self.start
        while True:
            positions = (torch.arange(steps)[:, None] * self.global_batch + (base + share)).flatten()
            drawn = dict(self.numbers(positions)) if self.numbers else {}
            if self.flip and not self.augment:
                drawn[MIRRORED] = is_mirrored(self.seed, positions)
            for i in range(steps):
                yield {name: values[i * len(share) : (i + 1) * len(share)] for name, values in drawn.items()}
            base += steps * self.global_batch

    def _make(self, found: Stored, drawn: dict[str, Tensor], stream: torch.cuda.Stream | None) -> Batch:
        positions, stored, labels = torch.from_numpy(found[0]), found[1], found[2]
        images = stored.to(self.device, non_blocking=True)
        small = {POSITIONS: positions, LABELS: labels} | {name: x[: len(positions)] for name, x in drawn.items()}
        if stream is not None:  # a copy from pageable memory would wait for the device
            small = {name: x.pin_memory() for name, x in small.items()}
        small = {name: x.to(self.device, non_blocking=True) for name, x in small.items()}
        batch = self._transform(images, small.pop(LABELS), small.pop(POSITIONS), small)
        if stream is not None:
            stream.synchronize()  # blocks this thread, not the training thread
        return batch

    def _transform(self, images: Tensor, labels: Tensor, positions: Tensor, numbers: dict[str, Tensor]) -> Batch:
        mirrored = numbers.pop(MIRRORED, None)
        if self.raw:
            return Batch(images, labels, positions, numbers=numbers)
        if self.dataset.is_latent:
            drawn = draw_latents(images, self.dataset.encoding, self.seed, positions, mirrored)
            return Batch(drawn, labels, positions, numbers=numbers)
        if mirrored is not None:  # before the conversion: one byte per value
            images = mirror_images(images, mirrored, dim=2)
        x = images.permute(0, 3, 1, 2)
        x = (x if self.channels_last else x.contiguous()).float().mul_(1 / 127.5).sub_(1)
        if not self.augment:
            return Batch(x, labels, positions, numbers=numbers)
        x, label = augment_images(x, self.seed, positions, self.augment, flip=self.flip)
        return Batch(x, labels, positions, label, numbers)

    def _use_on_current_stream(self, batch: Batch) -> None:
        """Record that the current stream uses these tensors, which were allocated on the loader's stream."""
        stream = torch.cuda.current_stream(self.device)
        for tensor in (batch.images, batch.labels, batch.positions, batch.augment_label, *batch.numbers.values()):
            if tensor is not None:
                tensor.record_stream(stream)
