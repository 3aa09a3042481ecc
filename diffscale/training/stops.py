"""What a run is asked to stop for at its next checkpoint: a signal to its command, or its wall-clock limit."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

SIGNAL, WALL = 1, 2  # what rank 0 may tell all to stop for
STOPPED = {SIGNAL: "signal", WALL: "wall"}  # the outcome's reason
EVERY_SECONDS = 0.25


class Stops:
    """wish: 0, SIGNAL or WALL. A thread asks, from `start` to `close`, so that no step waits for the answer; rank 0
    alone starts it."""

    def __init__(self, asked: Callable[[], bool], wall_seconds: float | None) -> None:
        self.wish = 0
        self._asked, self._limit, self._began = asked, wall_seconds, time.monotonic()
        self._over = threading.Event()

    def start(self) -> None:
        threading.Thread(target=self._watch, daemon=True, name="stop").start()

    def close(self) -> None:
        self._over.set()

    def _watch(self) -> None:
        while not self.wish and not self._over.is_set():
            if self._asked():
                self.wish = SIGNAL
            elif self._limit is not None and time.monotonic() - self._began >= self._limit:
                self.wish = WALL
            self._over.wait(EVERY_SECONDS)
