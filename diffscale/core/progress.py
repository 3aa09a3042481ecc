"""Progress of long work: bars on a terminal, lines in a log file or a job.

A function that can take longer than a few seconds says what it does and counts what is done:

    with working("samples", total=5_000) as work:
        for chunk in chunks:
            ...
            work.advance(len(chunk))

It shows nothing by itself. `shown_by` chooses the display of everything inside it: `run_app` shows the work of a
command on standard error, and a training worker sends its own to the command that waits for it.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

LINE_SECONDS = 10.0
LINE_SHARE = 0.05  # of the whole: the next line comes after it or after LINE_SECONDS, whichever is first
POLL_SECONDS = 0.5
BAR_WIDTH = 30  # characters


@dataclass
class Work:
    """Work that is being done, by one thread; displays read it from others."""

    title: str
    total: int | None = None  # of `unit`; None where it is not known
    unit: str = "images"  # empty for work that is not counted
    done: int = 0
    rate: float | None = None  # per second, where the work knows better than its own average
    note: str = ""  # follows the numbers
    started: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        self.first = self.done  # by an earlier process: not part of the average

    def advance(self, count: int = 1) -> None:
        """Count `count` more as done."""
        self.done += count

    @property
    def seconds(self) -> float:
        """Seconds since the work began."""
        return time.monotonic() - self.started

    def line(self) -> str:
        """Return what is done of the whole, the rate and the time left."""
        parts = [self.title if not self.unit else f"{self.title}: {self._counted()}"]
        average = (self.done - self.first) / max(self.seconds, 1e-9)
        rate = average if self.rate is None else self.rate
        if rate > 0:
            parts.append(_per_time(rate, self.unit))
        if self.total is not None and average > 0 and self.done < self.total:
            parts.append(f"{clock((self.total - self.done) / average)} left")
        elif not average or self.done == self.total:  # nothing is done yet, or what follows is not counted
            parts.append(f"{clock(self.seconds)} so far")
        return "  ".join([*parts, *filter(None, [self.note])])

    def summary(self) -> str:
        """Return what was done and how long it took."""
        done = self.done - self.first
        rate = "" if not done else f" ({_per_time(done / max(self.seconds, 1e-9), self.unit)})"
        return f"{self.title}: {self._counted()} in {clock(self.seconds)}{rate}"

    def _counted(self) -> str:
        size = _megabytes if self.unit == "bytes" else "{:,}".format
        whole = "" if self.total is None else f" of {size(self.total)}"
        return f"{size(self.done)}{whole} {'MB' if self.unit == 'bytes' else self.unit}"


Display = Callable[[Work], AbstractContextManager[Any]]
"""Shows a piece of work while the context is open."""

_display: ContextVar[Display | None] = ContextVar("display", default=None)


@contextmanager
def working(title: str, total: int | None = None, unit: str = "images", done: int = 0) -> Iterator[Work]:
    """Context of a piece of work, which the enclosing `shown_by` displays.

    title: what is done, such as "samples"
    total: how many of `unit` there are; None where that is not known
    unit: what is counted, in the plural; of "bytes" megabytes are shown; empty for work that is not counted
    done: how many of them an earlier process did
    """
    work, display = Work(title, total, unit, done), _display.get()
    with nullcontext() if display is None else display(work):
        yield work


@contextmanager
def shown_by(display: Display) -> Iterator[None]:
    """Context whose work, in this thread, is shown by `display`."""
    token = _display.set(display)
    try:
        yield
    finally:
        _display.reset(token)


@contextmanager
def polling(show: Callable[[], None]) -> Iterator[None]:
    """Context in which a thread calls `show` every POLL_SECONDS. It has ended when the context is left."""
    ended = threading.Event()

    def poll() -> None:
        while not ended.wait(POLL_SECONDS):
            show()

    thread = threading.Thread(target=poll, daemon=True, name="progress")
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def console_display() -> Display:
    """Return bars if standard error is a terminal, else lines."""
    return Bars() if sys.stderr.isatty() else Lines()


class Lines:
    """A line every 10 s or 5 % of the work, and one at its end.

    Work inside other work speaks for both: the outer one has a line for each 5 % alone.
    """

    def __init__(self, seconds: float = LINE_SECONDS) -> None:
        self.seconds = seconds
        self._open: list[Work] = []  # the innermost last

    @contextmanager
    def __call__(self, work: Work) -> Iterator[None]:
        """Context in which the work is shown. Work that fails has no last line."""
        printed, share = time.monotonic(), _share(work)

        def show() -> None:
            nonlocal printed, share
            waited = time.monotonic() - printed >= self.seconds and work is self._open[-1]
            if waited or _share(work) - share >= LINE_SHARE:
                printed, share = time.monotonic(), _share(work)
                _print(work.line())

        self._open.append(work)
        try:
            with polling(show):
                yield
        finally:
            self._open.remove(work)
        if work.done > work.first:
            _print(work.summary())


class Bars:
    """Bars below each other, which vanish when their work ends."""

    def __init__(self, console: Console | None = None) -> None:
        """console: default: standard error."""
        self._console, self._lock, self._open = console, threading.Lock(), 0
        self._progress: Any = None

    @contextmanager
    def __call__(self, work: Work) -> Iterator[None]:
        """Context in which the work is shown."""
        with self._lock:
            if not self._open:
                self._progress = _rich_progress(self._console)
                self._progress.start()
            self._open += 1
            task = self._progress.add_task("", total=None, work=work)
        try:
            yield
        finally:
            with self._lock:
                self._progress.remove_task(task)
                self._open -= 1
                if not self._open:
                    self._progress.stop()


def _rich_progress(console: Console | None) -> Any:
    from rich.console import Console  # import cost
    from rich.progress import Progress, ProgressColumn  # import cost
    from rich.progress_bar import ProgressBar  # import cost
    from rich.text import Text  # import cost

    class Bar(ProgressColumn):
        def render(self, task: Any) -> ProgressBar:
            work = task.fields["work"]
            return ProgressBar(total=work.total, completed=work.done, width=BAR_WIDTH, pulse=work.total is None)

    class Line(ProgressColumn):
        def render(self, task: Any) -> Text:
            return Text(task.fields["work"].line(), overflow="ellipsis", no_wrap=True)

    return Progress(Bar(), Line(), console=console or Console(stderr=True), transient=True, refresh_per_second=4)


def _print(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _share(work: Work) -> float:
    return work.done / work.total if work.total else 0.0


def _megabytes(count: float) -> str:
    return f"{count / 1e6:,.1f}"


def _per_time(rate: float, unit: str) -> str:
    if unit == "bytes":
        return f"{_megabytes(rate)} MB/s"
    for seconds, name in ((1, "s"), (60, "min"), (3600, "h")):
        if rate * seconds >= 1 or name == "h":
            break
    count = f"{rate * seconds:,.1f}" if round(rate * seconds, 1) < 10 else f"{rate * seconds:,.0f}"
    return f"{count} {unit}/{name}"


def clock(seconds: float) -> str:
    """Return a duration as 12 s, 3:05 min or 2:03:10 h."""
    whole = max(round(seconds), 0)
    minutes, rest = divmod(whole, 60)
    if not minutes:
        return f"{rest} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d} h" if hours else f"{minutes}:{rest:02d} min"
