"""Console progress of a run while its workers train: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import threading
import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from diffscale.distributed.messages import EVALUATED, PHASE, PROGRESS, Messages

POLL_SECONDS = 0.5
LINE_SECONDS = 15.0


class Display:
    """A thread that shows the messages of rank 0, within `with Display(...)`."""

    def __init__(self, messages: Messages, name: str, show: bool = True) -> None:
        self.messages, self.name, self.show = messages, name, show
        self.console = Console(stderr=False)
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True, name="progress")

    def __enter__(self) -> Display:
        if self.show:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        if self.show:
            self._thread.join()

    def _run(self) -> None:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[text]}"),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=self.console, disable=not self.console.is_terminal, transient=True) as bar:
            task = bar.add_task(self.name, total=None, text="starting")
            line, evaluated, printed = time.monotonic(), -1, ""
            shown: dict[str, int] = {}
            while not self._done.wait(POLL_SECONDS):
                seen, phase = self.messages.get(PROGRESS), self.messages.get(PHASE)
                text = describe(seen, phase)
                bar.update(task, text=text, completed=(seen or {}).get("images_seen", 0), total=(seen or {}).get("end"))
                evaluated = self._show_evaluation(evaluated)
                self._show_notices(shown)
                due = time.monotonic() - line >= LINE_SECONDS and text != printed
                if due and not self.console.is_terminal:
                    self.console.print(f"{self.name}: {text}", highlight=False, soft_wrap=True)
                    line, printed = time.monotonic(), text
            self._show_evaluation(evaluated)
            self._show_notices(shown)

    def _show_notices(self, shown: dict[str, int]) -> None:
        """Print new warnings. shown: number of warnings already shown, by writer."""
        for writer, texts in self.messages.notices().items():
            for text in texts[shown.get(writer, 0) :]:
                self.console.print(f"{self.name}: warning: {text}", highlight=False, soft_wrap=True)
            shown[writer] = len(texts)

    def _show_evaluation(self, evaluated: int) -> int:
        """Print a line for a new evaluation and return its images seen. evaluated: those of the last line."""
        found = self.messages.get(EVALUATED)
        if found is None or found["images_seen"] == evaluated:
            return evaluated
        values = "  ".join(f"{k} {v:.4g}" for k, v in found.items() if k != "images_seen")
        self.console.print(f"{self.name}: {found['images_seen']:,} images  {values}", highlight=False, soft_wrap=True)
        return int(found["images_seen"])


def describe(seen: dict[str, Any] | None, phase: dict[str, Any] | None) -> str:
    """Return one line with the phase, the images seen, the loss and the speed."""
    name = (phase or {}).get("phase", "starting")
    if seen is None:
        return str(name)
    end = f" / {seen['end']:,}" if seen["end"] else ""
    loss = f"  loss {seen['loss']:.4f}" if seen["loss"] is not None else ""
    use = f"  MFU {seen['mfu']:.0%}" if seen.get("mfu") else ""
    return f"{name}  {seen['images_seen']:,}{end} images{loss}  {seen['images_per_second']:,.0f} images/s{use}"
