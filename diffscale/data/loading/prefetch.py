"""Fetches shards of a remote dataset to this node before the order needs them."""

from __future__ import annotations

import queue
import threading
from contextlib import suppress
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diffscale.core.errors import UserError
from diffscale.data.format.dataset import Dataset
from diffscale.data.format.errors import ShardError
from diffscale.data.loading.order import lane_window, positions_to_indices

STRIDE = 8192  # positions whose shards are fetched together


class ShardPrefetcher:
    """A thread that fetches the shards of the next window (of `order=blocks` and `order=lanes`).

    dataset: a remote one
    seed: of the order
    start: the first position
    share: this worker's places in a global batch
    global_batch: images of a step over all workers
    form: keywords of `positions_to_indices`
    """

    def __init__(
        self,
        dataset: Dataset,
        seed: int,
        start: int,
        share: NDArray[np.int64],
        global_batch: int,
        form: dict[str, Any],
    ) -> None:
        self.dataset, self.seed, self.share, self.form, self.requested = dataset, seed, share, form, start
        self.rows = window_rows(dataset, form)
        self.steps = np.arange(max(1, STRIDE // len(share)))[:, None] * global_batch
        self.stride = len(self.steps) * global_batch
        self._wanted: queue.SimpleQueue[int | None] = queue.SimpleQueue()
        self._closed = False
        threading.Thread(target=self._run, name="diffscale-ahead", daemon=True).start()

    def advance(self, position: int) -> None:
        """Move the prefetch window to `position`."""
        while self.requested < position + self.rows:
            self._wanted.put(self.requested)
            self.requested += self.stride

    def close(self) -> None:
        """End the thread after the current fetch."""
        self._closed = True
        self._wanted.put(None)

    def _run(self) -> None:
        while (position := self._wanted.get()) is not None and not self._closed:
            positions = (position + self.steps + self.share).ravel()
            rows = positions_to_indices(positions, self.dataset.n, self.seed, **self.form)
            shards = np.unique(np.searchsorted(self.dataset.starts, rows, side="right") - 1)
            with suppress(ShardError):  # the loader raises it when it gathers the rows
                self.dataset.fetch(shards.tolist())


def window_rows(dataset: Dataset, form: dict[str, Any]) -> int:
    """Return how many rows the order draws from at a time, for all workers together."""
    if form["order"] == "rows":
        return dataset.n
    if form["order"] == "blocks":
        return min(dataset.n, form["window"] * form["block_rows"])
    return min(dataset.n, form["lanes"] * lane_window(form["window"], form["lanes"]) * form["block_rows"])


def check_cache(dataset: Dataset, form: dict[str, Any], share: float) -> None:
    """Raise UserError unless the cache of a remote dataset can hold the current window and the next.

    In a smaller cache each batch would fetch again the shards that the batch before had evicted.

    share: part of each batch that the workers of this node take, 0 to 1
    """
    if dataset.cache is None:
        return
    whole = sum(shard.bytes for shard in dataset.split.shards)
    part = min(1.0, share) if form["order"] == "lanes" else 1.0  # in the other orders a node reads every shard
    needed = part * min(whole, 2 * whole * window_rows(dataset, form) / dataset.n) / 1e9
    if dataset.cache.gigabytes < needed:
        ways = {
            "rows": ", or data.order=blocks, which needs few shards at once",
            "lanes": ", more nodes, or a smaller data.lanes: each lane needs a shard at a time",
        }
        raise UserError(
            setting="data.cache_gigabytes",
            value=dataset.cache.gigabytes,
            expected=f"at least {needed:.3g} for data.order={form['order']} on {dataset.path}",
            fix="allow more" + ways.get(form["order"], ""),
        )
