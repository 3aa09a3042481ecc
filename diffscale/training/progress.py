"""What the command shows of a run while its workers train: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import threading
import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from diffscale.distributed.messages import Channel
from diffscale.training.monitor import EVALUATED, PHASE, PROGRESS

POLL_SECONDS = 0.5
LINE_SECONDS = 15.0


class Display:
    """A thread that shows what rank 0 puts into the channel; `with Display(...)`."""

    def __init__(self, channel: Channel, name: str, show: bool = True) -> None:
        self.channel, self.name, self.show = channel, name, show
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
            line, judged, printed = time.monotonic(), -1, ""
            told: dict[str, int] = {}
            while not self._done.wait(POLL_SECONDS):
                seen, phase = self.channel.get(PROGRESS), self.channel.get(PHASE)
                text = describe(seen, phase)
                bar.update(task, text=text, completed=(seen or {}).get("images_seen", 0), total=(seen or {}).get("end"))
                judged = self._tell_evaluation(judged)
                self._tell_notices(told)
                due = time.monotonic() - line >= LINE_SECONDS and text != printed
                if due and not self.console.is_terminal:
                    self.console.print(f"{self.name}: {text}", highlight=False, soft_wrap=True)
                    line, printed = time.monotonic(), text
            self._tell_evaluation(judged)
            self._tell_notices(told)

    def _tell_notices(self, told: dict[str, int]) -> None:
        """Warnings that were not shown yet. told: how many of each writer were."""
        for writer, texts in self.channel.notices().items():
            for text in texts[told.get(writer, 0) :]:
                self.console.print(f"{self.name}: warning: {text}", highlight=False, soft_wrap=True)
            told[writer] = len(texts)

    def _tell_evaluation(self, judged: int) -> int:
        """A line for each evaluation."""
        found = self.channel.get(EVALUATED)
        if found is None or found["images_seen"] == judged:
            return judged
        values = "  ".join(f"{k} {v:.4g}" for k, v in found.items() if k != "images_seen")
        self.console.print(f"{self.name}: {found['images_seen']:,} images  {values}", highlight=False, soft_wrap=True)
        return int(found["images_seen"])


def describe(seen: dict[str, Any] | None, phase: dict[str, Any] | None) -> str:
    """One line: how far, loss, speed."""
    name = (phase or {}).get("phase", "starting")
    if seen is None:
        return str(name)
    end = f" / {seen['end']:,}" if seen["end"] else ""
    loss = f"  loss {seen['loss']:.4f}" if seen["loss"] is not None else ""
    use = f"  MFU {seen['mfu']:.0%}" if seen.get("mfu") else ""
    return f"{name}  {seen['images_seen']:,}{end} images{loss}  {seen['images_per_second']:,.0f} images/s{use}"
