"""A rank that hangs is noticed by the clock: after too long without progress it says where it stands and ends itself,
so that Ray Train starts the workers again from the last checkpoint."""

from __future__ import annotations

import faulthandler
import logging
import os
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from diffscale.core import storage

log = logging.getLogger(__name__)

ENVIRONMENT = "DIFFSCALE_HANG_SECONDS"
DEFAULT_SECONDS = 600.0
SLOW_PHASES = 10.0  # evaluation, compilation and loading may take this many times longer
EXIT_HUNG = 74


def hang_seconds() -> float:
    """How long a rank may make no progress: $DIFFSCALE_HANG_SECONDS, which `train` hands on to its workers."""
    return float(os.environ.get(ENVIRONMENT, DEFAULT_SECONDS))


class Watchdog:
    """A thread that ends this process when `beat` was not called for too long (600 s, or $DIFFSCALE_HANG_SECONDS).

    Every rank has one: where one hangs the others wait for it, all of them end, and the stack of each, under
    RUN/hangs, shows which one was not waiting.
    """

    def __init__(self, run_folder: str, rank: int) -> None:
        self.run_folder, self.rank = run_folder, rank
        self.seconds = hang_seconds()
        self._last, self._factor, self._done = time.monotonic(), SLOW_PHASES, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True, name="watchdog")
        self._thread.start()

    def beat(self) -> None:
        self._last, self._factor = time.monotonic(), 1.0

    def go_on(self) -> None:
        """Like `beat`, in the middle of what may take long."""
        self._last = time.monotonic()

    @contextmanager
    def slow(self) -> Iterator[None]:
        """For what may take long."""
        self._last, self._factor = time.monotonic(), SLOW_PHASES
        try:
            yield
        finally:
            self._last, self._factor = time.monotonic(), 1.0

    def close(self) -> None:
        self._done.set()

    def _watch(self) -> None:
        while not self._done.wait(min(1.0, self.seconds / 4)):
            silent = time.monotonic() - self._last
            if silent > self.seconds * self._factor:
                self._give_up(silent)

    def _give_up(self, silent: float) -> None:
        log.error("rank %d made no progress for %.0f s; its stack is in %s/hangs", self.rank, silent, self.run_folder)
        with suppress(Exception), tempfile.TemporaryFile() as file:
            faulthandler.dump_traceback(file)
            file.seek(0)
            name = f"rank-{self.rank}-{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}.txt"
            storage.write_bytes(storage.join(self.run_folder, "hangs", name), file.read())
        os._exit(EXIT_HUNG)
