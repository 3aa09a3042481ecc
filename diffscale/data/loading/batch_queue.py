"""Queue between the loader thread and the training thread."""

from __future__ import annotations

import queue
from typing import Generic, TypeVar

Item = TypeVar("Item")

AFTER_CLOSING = 3  # puts after `close` that must not block: a group, the rest, the end


class BatchQueue(Generic[Item]):
    """Bounded queue from the loader thread to the training thread: groups of batches, an exception, or None at the end.

    It is made of two simple queues, one of which holds free places. queue.Queue wakes each side twice as often, and
    waking a thread costs more than a small batch.

    places: groups that may be ahead of the training thread
    """

    def __init__(self, places: int) -> None:
        self.closed = False
        self._ready: queue.SimpleQueue[list[Item] | BaseException | None] = queue.SimpleQueue()
        self._free: queue.SimpleQueue[None] = queue.SimpleQueue()
        for _ in range(places):
            self._free.put(None)

    def put(self, item: list[Item] | BaseException | None) -> None:
        """Wait for a free place and append the item; do nothing once the queue is closed."""
        self._free.get()
        if not self.closed:
            self._ready.put(item)

    def get(self) -> list[Item] | BaseException | None:
        """Wait for the next item and remove it."""
        item = self._ready.get()
        self._free.put(None)
        return item

    def close(self) -> None:
        """Close the queue; `put` returns immediately afterwards."""
        self.closed = True
        for _ in range(AFTER_CLOSING):
            self._free.put(None)
