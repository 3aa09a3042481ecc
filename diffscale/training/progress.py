"""Progress of a run: its workers send it, the command that waits for them shows it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from rich.console import Console

from diffscale.core.progress import POLL_SECONDS, Work, working
from diffscale.distributed.messages import EVALUATED, PHASE, PROGRESS, Messages
from diffscale.training.metrics_log import Listener


class PhaseDisplay:
    """Sends the work of a training worker to the command, as a text next to the worker's phase."""

    def __init__(self, listener: Listener, phase: str) -> None:
        self.listener, self.phase = listener, phase

    @contextmanager
    def __call__(self, work: Work) -> Iterator[None]:
        """Context in which the work is sent."""
        ended = threading.Event()
        thread = threading.Thread(target=self._send, args=(work, ended), daemon=True, name="progress")
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()
            self.listener.put(PHASE, {"phase": self.phase})

    def _send(self, work: Work, ended: threading.Event) -> None:
        while not ended.wait(POLL_SECONDS):
            self.listener.put(PHASE, {"phase": self.phase, "work": work.line()})


class RunProgress:
    """A thread that shows the messages of rank 0, within `with RunProgress(...)`."""

    def __init__(self, messages: Messages, name: str, show: bool = True) -> None:
        """show: whether to show anything at all."""
        self.messages, self.name, self.show = messages, name, show
        self.console = Console(stderr=False)
        self._stack = ExitStack()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True, name="progress")

    def __enter__(self) -> RunProgress:
        if self.show:
            self.work = self._stack.enter_context(working(self.name))
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        if self.show:
            self._thread.join()
        self._stack.close()

    def _run(self) -> None:
        evaluated, shown = -1, dict[str, int]()
        while True:
            ended = self._done.wait(POLL_SECONDS)
            follow(self.work, self.messages.get(PROGRESS), self.messages.get(PHASE))
            evaluated = self._show_evaluation(evaluated)
            self._show_notices(shown)
            if ended:
                return

    def _show_notices(self, shown: dict[str, int]) -> None:
        """Print new warnings. shown: number of warnings already shown, by writer."""
        for writer, texts in self.messages.notices().items():
            for text in texts[shown.get(writer, 0) :]:
                self._print(f"warning: {text}")
            shown[writer] = len(texts)

    def _show_evaluation(self, evaluated: int) -> int:
        """Print a line for a new evaluation and return its images seen. evaluated: those of the last line."""
        found = self.messages.get(EVALUATED)
        if found is None or found["images_seen"] == evaluated:
            return evaluated
        values = "  ".join(f"{k} {v:.4g}" for k, v in found.items() if k != "images_seen")
        self._print(f"{found['images_seen']:,} images  {values}")
        return int(found["images_seen"])

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
