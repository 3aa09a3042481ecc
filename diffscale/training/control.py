"""How a run is stopped from outside, and how a rank that hangs is noticed.

Stopping. SIGTERM or Ctrl-C reaches the command (`run.on_signals`), which puts STOP into the launch's `Messages`. On
rank 0 a thread of `StopRequests` reads it, or sees that train.wall_seconds have passed, and sets `reason`. Rank 0 adds
`reason` to the numbers that every step sums over the ranks (`Learner.step`), so all ranks see the request after the
same step. During an evaluation it takes effect after the current chunk of samples, which is kept. All ranks then save a
checkpoint, rank 0 sends the `Outcome` to the command, and the command exits with 143 (130 after Ctrl-C). The same
command resumes.

Hanging. Every rank has a `Watchdog`. After $DIFFSCALE_HANG_SECONDS without a step it writes the stacks of the process
under RUN/hangs and ends the process. Ray Train then starts the workers again from the last checkpoint.
"""

from __future__ import annotations

import faulthandler
import logging
import math
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Literal

from diffscale.core import storage
from diffscale.core.errors import UserError

log = logging.getLogger(__name__)

SIGNAL, WALL = 1, 2
REASONS: dict[int, Literal["signal", "wall"]] = {SIGNAL: "signal", WALL: "wall"}
POLL_SECONDS = 0.25

ENVIRONMENT = "DIFFSCALE_HANG_SECONDS"
DEFAULT_SECONDS = 600.0
SLOW_PHASES = 10.0  # evaluation, compilation and loading may take this many times longer
EXIT_HUNG = 74


class StopRequests:
    """Whether the run must stop at a checkpoint. reason: 0, SIGNAL or WALL.

    A thread polls, from `start` to `close`, so that no step waits for an answer. Rank 0 alone starts it.
    """

    def __init__(self, requested: Callable[[], bool], wall_seconds: float | None) -> None:
        """Start the wall clock.

        requested: returns whether a stop was requested
        wall_seconds: seconds after which to stop; None for no limit
        """
        self.reason = 0
        self._requested, self._limit, self._began = requested, wall_seconds, time.monotonic()
        self._closed = threading.Event()

    def start(self) -> None:
        """Start polling."""
        threading.Thread(target=self._poll, daemon=True, name="stop").start()

    def close(self) -> None:
        """Stop polling."""
        self._closed.set()

    def _poll(self) -> None:
        while not self.reason and not self._closed.is_set():
            if self._requested():
                self.reason = SIGNAL
            elif self._limit is not None and time.monotonic() - self._began >= self._limit:
                self.reason = WALL
            self._closed.wait(POLL_SECONDS)


def hang_seconds() -> float:
    """Return how long a rank may make no progress: $DIFFSCALE_HANG_SECONDS, which the command passes to its workers."""
    given = os.environ.get(ENVIRONMENT, str(DEFAULT_SECONDS))
    with suppress(ValueError):
        if 0 < float(given) < math.inf:
            return float(given)
    raise UserError(setting=ENVIRONMENT, value=given, expected="a number of seconds above 0")


class Watchdog:
    """A thread that ends this process if `beat` is not called for `hang_seconds`.

    If one rank hangs, the others wait for it and all of them end. The stacks under RUN/hangs show which rank was not
    waiting.
    """

    def __init__(self, run_folder: str, rank: int) -> None:
        self.run_folder, self.rank = run_folder, rank
        self.seconds = hang_seconds()
        self._last, self._factor, self._closed = time.monotonic(), SLOW_PHASES, threading.Event()
        self._callbacks: tuple[Callable[..., None], Callable[..., None]] | None = None
        self._thread = threading.Thread(target=self._watch, daemon=True, name="watchdog")
        self._thread.start()

    def beat(self) -> None:
        """Report progress: a step was made."""
        self._last, self._factor = time.monotonic(), 1.0

    def touch(self) -> None:
        """Report progress within a slow phase, which continues."""
        self._last = time.monotonic()

    @contextmanager
    def slow(self) -> Iterator[None]:
        """Context of a phase that may take SLOW_PHASES times longer."""
        self._last, self._factor = time.monotonic(), SLOW_PHASES
        try:
            yield
        finally:
            self._last, self._factor = time.monotonic(), 1.0

    def allow_compilation(self) -> None:
        """Give every compilation of the network the time of a slow phase, whenever it happens."""
        import torch._dynamo as dynamo  # import cost

        @dynamo.on_compile_start
        def begin(_: object) -> None:
            self._last, self._factor = time.monotonic(), SLOW_PHASES

        @dynamo.on_compile_end
        def end(_: object) -> None:  # the step that it belongs to goes on
            self._last = time.monotonic()

        self._callbacks = begin, end

    def close(self) -> None:
        """Stop watching."""
        self._closed.set()
        if self._callbacks is not None:
            from torch._dynamo.callback import callback_handler  # import cost

            callback_handler.remove_start_callback(self._callbacks[0])
            callback_handler.remove_end_callback(self._callbacks[1])

    def _watch(self) -> None:
        while not self._closed.wait(min(1.0, self.seconds / 4)):
            silent = time.monotonic() - self._last
            if silent > self.seconds * self._factor:
                self._end_process(silent)

    def _end_process(self, silent: float) -> None:
        log.error("rank %d made no progress for %.0f s; its stack is in %s/hangs", self.rank, silent, self.run_folder)
        with suppress(Exception), tempfile.TemporaryFile() as file:
            faulthandler.dump_traceback(file)
            file.seek(0)
            name = f"rank-{self.rank}-{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}.txt"
            storage.write_bytes(storage.join(self.run_folder, "hangs", name), file.read())
        os._exit(EXIT_HUNG)
