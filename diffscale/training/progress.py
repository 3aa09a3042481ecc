"""Progress of a run: its workers send it, the command that waits for them shows it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from rich.console import Console

from diffscale.core.progress import Work, polling, working
from diffscale.distributed.messages import EVALUATED, PHASE, PROGRESS, Messages
from diffscale.training.metrics_log import Listener


class PhaseDisplay:
    """Sends the work of a training worker to the command, as a text next to the worker's phase."""

    def __init__(self, listener: Listener, phase: str) -> None:
        self.listener, self.phase = listener, phase

    @contextmanager
    def __call__(self, work: Work) -> Iterator[None]:
        """Context in which the work is sent."""
        try:
            with polling(lambda: self.listener.put(PHASE, {"phase": self.phase, "work": work.line()})):
                yield
        finally:
            self.listener.put(PHASE, {"phase": self.phase})


class RunProgress:
    """Shows the messages of rank 0 within `with RunProgress(...)`."""

    def __init__(self, messages: Messages, name: str, show: bool = True) -> None:
        """show: whether to show anything at all."""
        self.messages, self.name, self.show = messages, name, show
        self.console = Console(stderr=False)
        self._stack = ExitStack()
        self._evaluated = -1  # images seen of the last evaluation that was printed
        self._shown: dict[str, int] = {}  # number of warnings that were printed, by writer

    def __enter__(self) -> RunProgress:
        if self.show:
            self.work = self._stack.enter_context(working(self.name))
            self._stack.callback(self._show)  # the last messages, after the polling
            self._stack.enter_context(polling(self._show))
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _show(self) -> None:
        follow(self.work, self.messages.get(PROGRESS), self.messages.get(PHASE))
        self._show_evaluation()
        self._show_notices()

    def _show_notices(self) -> None:
        """Print new warnings."""
        for writer, texts in self.messages.notices().items():
            for text in texts[self._shown.get(writer, 0) :]:
                self._print(f"warning: {text}")
            self._shown[writer] = len(texts)

    def _show_evaluation(self) -> None:
        """Print a line for a new evaluation."""
        found = self.messages.get(EVALUATED)
        if found is not None and found["images_seen"] != self._evaluated:
            values = "  ".join(f"{k} {v:.4g}" for k, v in found.items() if k != "images_seen")
            self._print(f"{found['images_seen']:,} images  {values}")
            self._evaluated = found["images_seen"]

    def _print(self, text: str) -> None:
        self.console.print(f"{self.name}: {text}", highlight=False, markup=False, soft_wrap=True)


def follow(work: Work, seen: dict[str, Any] | None, phase: dict[str, Any] | None) -> None:
    """Set the work to the last messages of a run's progress and phase."""
    notes = [(phase or {}).get("phase", "starting"), (phase or {}).get("work")]
    if seen is not None:
        if not work.done:  # what earlier launches did is no part of this one's average
            work.first = seen["images_seen"]
        work.done, work.total, work.rate = seen["images_seen"], seen["end"], seen["images_per_second"]
        if seen["loss"] is not None:
            notes.append(f"loss {seen['loss']:.4f}")
        if seen.get("mfu"):
            notes.append(f"MFU {seen['mfu']:.0%}")
    work.note = "  ".join(filter(None, notes))
