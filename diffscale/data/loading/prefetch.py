"""Shards of a remote dataset on this node before the order needs them."""

from __future__ import annotations

import queue
import threading
from contextlib import suppress
from typing import Any

import numpy as np

from diffscale.core.errors import UserError
from diffscale.data.format.dataset import Dataset
from diffscale.data.format.errors import ShardError
from diffscale.data.loading.order import positions_to_indices

STRIDE = 8192  # positions whose shards are fetched in one go


class FetchAhead:
    """Fetches what the order needs up to one window (of `order=blocks`) later, in the background.

    start: the first position. form: the keywords of `positions_to_indices`.
    """

    def __init__(self, dataset: Dataset, seed: int, start: int, form: dict[str, Any]) -> None:
        self.dataset, self.seed, self.form, self.asked = dataset, seed, form, start
        self.rows = window_rows(dataset, form)
        self._wanted: queue.SimpleQueue[int | None] = queue.SimpleQueue()
        self._closed = False
        threading.Thread(target=self._run, name="diffscale-ahead", daemon=True).start()

    def reach(self, position: int) -> None:
        """Tells that the reader is at `position`."""
        while self.asked < position + self.rows:
            self._wanted.put(self.asked)
            self.asked += STRIDE

    def close(self) -> None:
        self._closed = True
        self._wanted.put(None)

    def _run(self) -> None:
        while (position := self._wanted.get()) is not None and not self._closed:
            rows = positions_to_indices(position + np.arange(STRIDE), self.dataset.n, self.seed, **self.form)
            shards = np.unique(np.searchsorted(self.dataset.starts, rows, side="right") - 1)
            with suppress(ShardError):  # the reader meets it and raises it
                self.dataset.fetch(shards.tolist())


def window_rows(dataset: Dataset, form: dict[str, Any]) -> int:
    """Rows that the order keeps near at a time."""
    return dataset.n if form["order"] == "rows" else min(dataset.n, form["window"] * form["block_rows"])


def check_cache(dataset: Dataset, form: dict[str, Any]) -> None:
    """Raises UserError unless the cache of a remote dataset holds the window in use and the next one: in a smaller one
    every batch would fetch again what the batch before had displaced."""
    if dataset.cache is None:
        return
    whole = sum(shard.bytes for shard in dataset.split.shards)
    needed = min(whole, 2 * whole * window_rows(dataset, form) / dataset.n) / 1e9
    if dataset.cache.gigabytes < needed:
        rows = form["order"] == "rows"
        raise UserError(
            setting="data.cache_gigabytes",
            value=dataset.cache.gigabytes,
            expected=f"at least {needed:.3g} for data.order={form['order']} on {dataset.path}",
            fix="allow more" + (", or data.order=blocks, which needs few shards at a time" if rows else ""),
        )
