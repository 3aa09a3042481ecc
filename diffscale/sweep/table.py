"""The live table of a sweep's trials: rich on a terminal, one line for each change elsewhere."""

from __future__ import annotations

import json
import math
import sys
import threading
import time
from contextlib import ExitStack
from types import TracebackType
from typing import TYPE_CHECKING, NamedTuple

from rich.live import Live
from rich.table import Table

from diffscale.core import storage
from diffscale.core.console import make_console
from diffscale.core.progress import Work, working
from diffscale.records.schema import rank
from diffscale.sweep.importance import importance
from diffscale.sweep.space import edges, label, overrides_of
from diffscale.training.metrics_log import read_lines

if TYPE_CHECKING:
    from diffscale.sweep.ledger import Ledger, Trial

REFRESH_SECONDS = 3.0
QUIET_SECONDS = 90.0  # a trial without a new line of history for this long waits for a slot or for its rung


class Progress(NamedTuple):
    """Training FLOPs so far, FLOP/s, and the time of the report in seconds since 1970."""

    flops: float
    speed: float
    heard: float


class SweepTable:
    """The table of a running sweep; it reads the runs' records every few seconds."""

    def __init__(self, ledger: Ledger, trials: list[Trial]) -> None:
        self.ledger, self.trials = ledger, trials
        search = ledger.sweep.search
        self.suggested = search.samples if search.name == "tpe" else 0  # trials in all, which Optuna chooses on the way
        self.console = make_console()
        self.stop = threading.Event()
        self.seen: dict[str, str] = {}
        self.final: set[str] = set()  # trials whose line will not change
        self.rows: dict[str, tuple[str, ...]] = {}  # of the table, for those
        self.stack = ExitStack()
        self.work: Work | None = None  # where there is no table

    def __enter__(self) -> SweepTable:
        self.live = Live(self._render(), console=self.console, auto_refresh=False) if sys.stdout.isatty() else None
        if self.live:
            self.live.start()
        else:
            done, total = self._count(self.ledger.ended_ids()), max(len(self.trials), self.suggested)
            work = working(f"sweep {self.ledger.sweep.name}", total, "trials", done)
            self.work = self.stack.enter_context(work)
        self.thread = threading.Thread(target=self._watch, daemon=True)
        self.thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        self.stop.set()
        self.thread.join()
        self._show()
        self.stack.close()
        if self.live:
            self.live.stop()

    def _watch(self) -> None:
        while not self.stop.wait(REFRESH_SECONDS):
            self._show()

    def _show(self) -> None:
        if self.suggested and len(self.ledger.begun_ids()) > len(self.trials):
            self.trials = self.ledger.begun_trials()
        if self.live:
            self.live.update(self._render(), refresh=True)
            return
        ended = self.ledger.ended_ids()
        for trial in self.trials:
            if trial.id in self.final:
                continue
            line = self._line(trial)
            if line and self.seen.get(trial.id) != line:
                self.seen[trial.id] = line
                print(line, flush=True)
        self.final |= ended  # their lines had the last record
        if self.work:
            self.work.done = self._count(ended)

    def _count(self, ended: set[str]) -> int:
        return sum(trial.id in ended for trial in self.trials)

    def _progress(self, trial: Trial) -> Progress:
        """Return the progress of the trial's most recently active run, from its history and records."""
        rows = self.ledger.records(trial)
        found = Progress(rows[-1].train_flops if rows else 0.0, 0.0, 0.0)
        for folder in trial.folders:
            lines = read_lines(storage.join(folder, "metrics.jsonl"))
            if lines:
                last = json.loads(lines[-1])
                speed = last["images_per_second"] * last["train_flops"] / last["images_seen"]
                if last["time"] >= found.heard:
                    found = Progress(max(found.flops, last["train_flops"]), speed, last["time"])
        return found

    def _state(self, trial: Trial, progress: Progress) -> str:
        ended = self.ledger.ended(trial.id)
        if ended is not None or not progress.flops:
            return ended or "waiting"
        rows, halving = self.ledger.records(trial), self.ledger.sweep.scheduler.name == "halving"
        if halving and rows and rows[-1].train_flops >= progress.flops:
            return "at rung"  # it waits for the other trials of the rung
        return "running" if time.time() - progress.heard < QUIET_SECONDS else "waiting"

    def _line(self, trial: Trial) -> str:
        rows = self.ledger.records(trial)
        if not rows:
            return ""
        last, state = rows[-1], self._state(trial, self._progress(trial))
        return (
            f"{state:>8}  {label(trial.point)}  {self.ledger.metric} {shown(self.ledger.measured(last))} at "
            f"{last.train_flops:.3g} FLOPs ({last.images_seen:,} images)"
        )

    def _render(self) -> Table:
        table = Table(title=f"sweep {self.ledger.sweep.name}: {self.ledger.metric} by trial")
        for name in ("trial", "state", "rung", self.ledger.metric, "train FLOPs", "ETA"):
            table.add_column(name, justify="left" if name in ("trial", "state") else "right")
        ended = self.ledger.ended_ids()
        for trial in self.trials:
            row = self.rows.get(trial.id) or self._row(trial)
            if trial.id in ended:
                self.rows[trial.id] = row
            table.add_row(*row)
        return table

    def _row(self, trial: Trial) -> tuple[str, ...]:
        rows, progress = self.ledger.records(trial), self._progress(trial)
        rungs = self.ledger.sweep.scheduler.rungs_flops
        reached = sum(bool(rows) and rows[-1].train_flops >= r * (1 - 1e-9) for r in rungs)
        return (
            label(trial.point),
            self._state(trial, progress),
            f"{reached}/{len(rungs)}" if rungs else "",
            shown(self.ledger.measured(rows[-1])) if rows else "",
            f"{progress.flops:.3g}" if progress.flops else "",
            self._eta(trial, progress),
        )

    def _eta(self, trial: Trial, progress: Progress) -> str:
        """Return the time to the trial's next rung or its end, excluding evaluation."""
        if self._state(trial, progress) != "running" or not progress.speed:
            return ""
        goals = [*self.ledger.sweep.scheduler.rungs_flops, trial.experiments[0].train.flops or 0.0]
        ahead = [goal for goal in goals if goal > progress.flops]
        if not ahead:
            return "evaluating"
        seconds = (min(ahead) - progress.flops) / progress.speed
        return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"


def print_summary(ledger: Ledger, trials: list[Trial], best: Trial | None, failed: dict[str, str]) -> None:
    """Print the finished table, the settings that mattered, the best preset and the failed trials."""
    console = make_console()
    finals = sorted(trials, key=lambda t: _sort_key(ledger, t))
    table = Table(title=f"sweep {ledger.sweep.name}: best first")
    for name in ("trial", "end", ledger.metric, "train FLOPs"):
        table.add_column(name, justify="left" if name in ("trial", "end") else "right")
    for trial in finals:
        rows, value = ledger.records(trial), ledger.value(trial)
        end = "failed" if trial.id in failed else ledger.ended(trial.id) or "not started"
        table.add_row(
            label(trial.point),
            end,
            "" if value is None else shown(value),
            f"{rows[-1].train_flops:.3g}" if rows else "",
        )
    console.print(table)
    values = ledger.known_values(trials)
    known = [t for t in trials if t.id in values]
    points = [overrides_of(ledger.sweep, t.point) for t in known]
    for row in importance(points, [values[t.id] for t in known]).to_dict("records"):
        if math.isnan(row["importance"]):
            console.print(f"  {row['setting']}: {row['trials']} trials are too few to say how much it matters")
        else:
            share = f"{row['importance']:.0%} of the variance (95 % {row['low']:.0%}-{row['high']:.0%})"
            console.print(f"  {row['setting']} explains {share}")
    if best is not None:
        for edge in edges(ledger.sweep, best.point):
            console.print(f"  {edge}", soft_wrap=True)
        console.print(f"best: {label(best.point)}\n  {ledger.folder}/best.yaml", soft_wrap=True)
    for name, reason in failed.items():
        console.print(f"failed: {name}: {reason}", soft_wrap=True, markup=False)
    console.print(f"results: {ledger.folder}", soft_wrap=True)


def shown(value: float) -> str:
    """Return a metric's value with two decimals, or with four digits if it is small, as losses are."""
    return f"{value:.2f}" if abs(value) >= 10 else f"{value:.4g}"


def _sort_key(ledger: Ledger, trial: Trial) -> tuple[float, str]:
    value = ledger.value(trial)
    return (float("inf") if value is None else rank(ledger.metric, value), trial.id)
