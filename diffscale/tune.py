"""`python -m diffscale.tune SWEEP [key=value ...]`: many runs through Ray Tune, compared at equal compute.

Ray Tune places the trials; each trial is a Ray Train run that resumes from its own folder. What was suggested,
decided and finished is in the sweep's folder (diffscale/sweep/ledger.py), so the same command goes on after any
kill, repeats nothing and stops the same trials. Exit codes: 0 all trials ended; 1 some failed; 2 a setting is wrong;
143 SIGTERM and 130 Ctrl-C, after a checkpoint of every running trial.
"""

from __future__ import annotations

import signal
from dataclasses import dataclass
from typing import Annotated, Any

import typer
from pydantic import ValidationError

from diffscale.config.factory import build_diffusion, open_training_data
from diffscale.config.load import explain, load_tree, merge, parse_overrides
from diffscale.core.app import run_app
from diffscale.core.errors import UserError
from diffscale.sweep.decisions import promoted
from diffscale.sweep.ledger import Ledger, Trial, check_comparable
from diffscale.sweep.ray_tune import Stopped, run_suggested, run_trials
from diffscale.sweep.results import write_results
from diffscale.sweep.settings import Sweep
from diffscale.sweep.space import grid, label
from diffscale.sweep.table import SweepTable, print_summary
from diffscale.train import EXIT_RESUMABLE, received

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
SECTIONS = ("storage", "data", "model", "diffusion", "optim", "train", "eval")


@dataclass(frozen=True)
class SweepResult:
    """Where it is, its trials in order, the best of them and the ones that failed (id to reason)."""

    folder: str
    trials: list[Trial]
    best: Trial | None
    failed: dict[str, str]


@app.command()
def main(
    sweep: Annotated[str, typer.Argument(help="a sweep of the package or a YAML file")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value; of the sweep or of every trial")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="print the trials and start nothing")] = False,
) -> None:
    """Run a sweep, or go on with it."""
    ledger = Ledger(load_sweep(sweep, overrides or []))
    if dry_run:
        trials = planned(ledger)
        for trial in trials:
            print(f"{trial.id}  {label(trial.point)}")
        print(f"{len(trials)} trials x {ledger.sweep.replicates} seeds, compared by {ledger.metric}: {ledger.folder}")
        return
    try:
        result = run(ledger, handle_signals=True)
    except Stopped:
        print(f"stopped; the same command goes on with the sweep: {ledger.folder}", flush=True)
        raise typer.Exit(130 if signal.SIGINT in received else EXIT_RESUMABLE) from None
    if result.failed:
        raise typer.Exit(1)


def load_sweep(sweep: str, overrides: list[str]) -> Sweep:
    """A sweep file with overrides: a key of the sweep itself, or any setting, which then holds in every trial."""
    tree = load_tree(sweep, kind="sweeps")
    for item in overrides:
        key, _, _ = item.partition("=")
        value = parse_overrides([item])
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
    """The trials of a grid or random sweep; for tpe those begun so far. Raises UserError where they do not compare."""
    points = ledger.begun() if ledger.sweep.search.name == "tpe" else grid(ledger.sweep)
    trials = [t for t in map(ledger.trial, points) if t is not None]
    if not trials and ledger.sweep.search.name != "tpe":
        raise UserError(setting="constraints", value=ledger.sweep.constraints, expected="at least one point allowed")
    check_comparable(ledger.sweep, trials)
    for trial in trials:  # a singular combination is refused before anything is started
        build_diffusion(trial.experiments[0], open_training_data(trial.experiments[0]))
    return trials


def run(ledger: Ledger, handle_signals: bool = False) -> SweepResult:
    """Runs what is left of the sweep on the Ray cluster and writes its results beside it.

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
    return [t for t in trials if ledger.ended(t.id) is None]


def _alive(ledger: Ledger, trial: Trial, rung: int) -> bool:
    return all(ledger.decisions.get(r, trial.id) is True for r in range(rung))


def _decide(ledger: Ledger, trials: list[Trial], rung: int, flops: float) -> None:
    """Synchronous successive halving: a pure function of the records of a whole rung."""
    values = {t.id: ledger.value(t, flops) for t in trials}
    known = {name: value for name, value in values.items() if value is not None}
    last = rung == len(ledger.sweep.scheduler.rungs_flops) - 1
    keep = set() if last else promoted(known, ledger.sweep.scheduler.reduction, ledger.higher_is_better)
    for name, value in known.items():
        goes_on = ledger.decisions.put(rung, name, name in keep, value)
        if not goes_on:
            ledger.note_ended(name, "finished" if last else "stopped")


if __name__ == "__main__":
    run_app(app)
