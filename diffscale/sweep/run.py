"""Plans a sweep and runs it to its end: loads the file, places the trials, decides at each rung, writes the results.

What was suggested, decided and finished is in the sweep's folder (`ledger.py`). The same sweep run again continues
after any kill, repeats nothing and stops the same trials.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from diffscale.config.load import explain, load_tree, merge, parse_overrides, resolve_paths
from diffscale.core.errors import UserError
from diffscale.core.progress import working
from diffscale.sweep.decisions import survivors
from diffscale.sweep.ledger import Ledger, Trial, check_comparable
from diffscale.sweep.ray_tune import run_suggested, run_trials
from diffscale.sweep.results import write_results
from diffscale.sweep.settings import Sweep
from diffscale.sweep.space import grid, label
from diffscale.sweep.table import SweepTable, print_summary
from diffscale.training.settings_check import check_settings

SECTIONS = ("storage", "data", "model", "diffusion", "optim", "train", "eval")


@dataclass(frozen=True)
class SweepResult:
    """A finished sweep."""

    folder: str
    trials: list[Trial]  # in the order of the grid
    best: Trial | None
    failed: dict[str, str]  # trial id to reason


def load_sweep(sweep: str, overrides: list[str]) -> Sweep:
    """Return the settings of a sweep file with overrides: keys of the sweep itself, or settings of every trial."""
    tree = load_tree(sweep, kind="sweeps")
    for item in overrides:
        key, _, _ = item.partition("=")
        value = resolve_paths(parse_overrides([item]))  # here: a trial's working directory is another one
        if key.split(".")[0] in SECTIONS:
            tree["overrides"] = {**tree.get("overrides", {}), key: _leaf(value)}
        elif key.startswith("space."):
            tree["space"] = {**tree.get("space", {}), key.removeprefix("space."): _leaf(value)}
        else:
            tree = merge(tree, value)
    try:
        return Sweep.model_validate(tree)
    except ValidationError as error:
        raise explain(error, Sweep, tree) from None


def _leaf(tree: Any) -> Any:
    while isinstance(tree, dict) and len(tree) == 1:
        tree = next(iter(tree.values()))
    return tree


def planned(ledger: Ledger) -> list[Trial]:
    """Return the trials of a grid or random sweep; for tpe those begun so far.

    Raise UserError for trials whose results could not be compared, and for one whose settings cannot train, before
    anything is started. An earlier launch has checked the trials that it started.
    """
    trials = trials_of(ledger)
    check_comparable(ledger.sweep, trials)
    check_settings(ledger.common)
    checked = ledger.begun_ids()
    with working("checking settings", len(trials), "trials") as work:
        for trial in trials:
            if trial.id not in checked:
                try:
                    check_settings(trial.experiments[0])
                except UserError as error:
                    where = f"in the trial {label(trial.point)}"
                    error.reason = f"{error.reason}; {where}" if error.reason else where
                    raise
            work.advance()
    return trials


def trials_of(ledger: Ledger) -> list[Trial]:
    """Return the trials without the checks of `planned`, for which the dataset must exist."""
    if ledger.sweep.search.name == "tpe":
        return ledger.begun_trials()
    trials = [t for t in map(ledger.trial, grid(ledger.sweep)) if t is not None]
    if not trials:
        raise UserError(setting="constraints", value=ledger.sweep.constraints, expected="at least one point allowed")
    return trials


def run(ledger: Ledger, handle_signals: bool = False) -> SweepResult:
    """Run the unfinished part of the sweep on the Ray cluster and write its results into its folder.

    handle_signals: SIGTERM and SIGINT end the running trials at a checkpoint and raise Stopped (main thread only).
    """
    trials = planned(ledger)
    ledger.begin()
    failed: dict[str, str] = {}
    with SweepTable(ledger, trials):
        if ledger.sweep.scheduler.name == "halving":
            for rung, flops in enumerate(ledger.sweep.scheduler.rungs_flops):
                alive = [t for t in trials if _alive(ledger, t, rung)]
                todo = [t for t in alive if ledger.value(t, flops) is None]
                failed |= run_trials(ledger, todo, flops, handle_signals)
                _decide(ledger, [t for t in alive if t.id not in failed], rung, flops)
        elif ledger.sweep.search.name == "tpe":
            failed |= run_trials(ledger, _unfinished(ledger, trials), None, handle_signals)
            failed |= run_suggested(ledger, trials, handle_signals)
            trials = planned(ledger)
        else:
            failed |= run_trials(ledger, _unfinished(ledger, trials), None, handle_signals)
    best = ledger.best(trials)
    write_results(ledger, trials, best)
    print_summary(ledger, trials, best, failed)
    return SweepResult(ledger.folder, trials, best, failed)


def _unfinished(ledger: Ledger, trials: list[Trial]) -> list[Trial]:
    ended = ledger.ended_ids()
    return [t for t in trials if t.id not in ended]


def _alive(ledger: Ledger, trial: Trial, rung: int) -> bool:
    return all(ledger.decisions.get(r, trial.id) is True for r in range(rung))


def _decide(ledger: Ledger, trials: list[Trial], rung: int, flops: float) -> None:
    """Decide by synchronous successive halving, a pure function of the records of a whole rung."""
    values = {t.id: ledger.value(t, flops) for t in trials}
    known = {name: value for name, value in values.items() if value is not None}
    last = rung == len(ledger.sweep.scheduler.rungs_flops) - 1
    keep = set() if last else survivors(known, ledger.sweep.scheduler.reduction, ledger.higher_is_better)
    for name, value in known.items():
        goes_on = ledger.decisions.put(rung, name, name in keep, value)
        if not goes_on and ledger.ended(name) is None:
            ledger.note_ended(name, "finished" if last else "stopped")
