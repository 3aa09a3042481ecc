"""`python -m diffscale.tune SWEEP [key=value ...]`: many runs through Ray Tune, compared at equal compute.

Ray Tune places the trials; each trial is a Ray Train run that resumes from its own folder. What was suggested,
decided and finished is in the sweep's folder (diffscale/sweep/ledger.py), so the same command goes on after any
kill, repeats nothing and stops the same trials.
"""

from __future__ import annotations

import json
import os
import tempfile
from dataclasses import dataclass
from typing import Annotated, Any

import typer
import yaml
from pydantic import ValidationError

from diffscale import storage
from diffscale.build import build_diffusion, open_training_data
from diffscale.cli import explain, load_tree, merge, parse_overrides, run_app, validate
from diffscale.errors import UserError
from diffscale.experiment import Experiment
from diffscale.sweep.halving import promoted
from diffscale.sweep.importance import importance
from diffscale.sweep.ledger import Ledger, Trial, check_comparable
from diffscale.sweep.settings import Sweep
from diffscale.sweep.space import VARIANT, Point, grid, label, overrides_of, point_id
from diffscale.sweep.table import SweepTable, print_summary

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
    result = run(ledger)
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


def run(ledger: Ledger) -> SweepResult:
    """Runs what is left of the sweep on the Ray cluster and writes its results beside it."""
    trials = planned(ledger)
    ledger.begin()
    failed: dict[str, str] = {}
    with SweepTable(ledger, trials):
        if ledger.sweep.scheduler.name == "halving":
            for rung, flops in enumerate(ledger.sweep.scheduler.rungs_flops):
                alive = [t for t in trials if _alive(ledger, t, rung)]
                todo = [t for t in alive if ledger.value(t, flops) is None]
                failed |= _run_trials(ledger, todo, flops)
                _decide(ledger, [t for t in alive if t.id not in failed], rung, flops)
        elif ledger.sweep.search.name == "tpe":
            failed |= _run_trials(ledger, [t for t in trials if ledger.ended(t.id) is None])
            failed |= _run_suggested(ledger, trials)
            trials = planned(ledger)
        else:
            failed |= _run_trials(ledger, [t for t in trials if ledger.ended(t.id) is None])
    best = ledger.best(trials)
    _write_results(ledger, trials, best)
    print_summary(ledger, trials, best, failed)
    return SweepResult(ledger.folder, trials, best, failed)


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


# ---- Ray Tune


def _run_trials(ledger: Ledger, trials: list[Trial], flops: float | None = None) -> dict[str, str]:
    """Runs each trial to its end, or to `flops`. Returns the ones that failed, with the reason."""
    if not trials:
        return {}
    for trial in trials:
        ledger.note_begun(trial.point)
    from ray import tune

    space = {"point": tune.grid_search([json.dumps(t.point) for t in trials])}
    return _fit(ledger, space, len(trials), flops=flops)


def _run_suggested(ledger: Ledger, done: list[Trial]) -> dict[str, str]:
    """The rest of a TPE sweep: Optuna suggests, told of every finished trial so far."""
    left = ledger.sweep.search.samples - len(done)
    if left <= 0:
        return {}
    from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution
    from ray.tune.search import ConcurrencyLimiter
    from ray.tune.search.optuna import OptunaSearch

    distributions: dict[str, BaseDistribution] = {}
    if ledger.sweep.variants:
        distributions[VARIANT] = CategoricalDistribution(list(ledger.sweep.variants))
    for key, d in ledger.sweep.space.items():
        values = d.grid or d.choice
        if values is not None:
            distributions[key] = CategoricalDistribution([json.dumps(v) for v in values])
        else:
            low, high = d.uniform or d.loguniform or (0.0, 1.0)
            distributions[key] = FloatDistribution(low, high, log=d.loguniform is not None)
    told = [(t, ledger.value(t)) for t in done]
    known = [(_encode(ledger, t.point), v) for t, v in told if v is not None]
    search = OptunaSearch(
        space=distributions,
        metric="value",
        mode="max" if ledger.higher_is_better else "min",
        seed=ledger.sweep.search.seed + len(done),
        points_to_evaluate=[p for p, _ in known] or None,
        evaluated_rewards=[v for _, v in known] or None,
    )
    limited = ConcurrencyLimiter(search, max_concurrent=ledger.sweep.max_concurrent)
    return _fit(ledger, {}, left, search=limited)


def _encode(ledger: Ledger, point: Point) -> Point:
    coded = {}
    for key, value in point.items():
        dimension = ledger.sweep.space.get(key)
        discrete = dimension is not None and (dimension.grid or dimension.choice) is not None
        coded[key] = json.dumps(value) if discrete else value
    return coded


def _decode(sweep: Sweep, coded: dict[str, Any]) -> Point:
    point = {}
    for key, value in coded.items():
        dimension = sweep.space.get(key)
        discrete = dimension is not None and (dimension.grid or dimension.choice) is not None
        point[key] = json.loads(value) if discrete else value
    return point


def _fit(
    ledger: Ledger,
    space: dict[str, Any],
    samples: int,
    flops: float | None = None,
    search: Any = None,
) -> dict[str, str]:
    """One `Tuner.fit`. A trial's driver holds no CPU (else the drivers take all and their workers wait for ever), so
    it asks for a sliver of the head node instead, and `max_concurrent` bounds them."""
    from diffscale.ray_session import connect

    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")  # our own table shows the trials
    connect()
    from ray import tune
    from ray.tune import FailureConfig, RunConfig, TuneConfig

    sweep_json = ledger.sweep.model_dump_json()

    def trial(config: dict[str, Any]) -> None:
        run_trial(Sweep.model_validate_json(sweep_json), config, flops)

    folder = tempfile.mkdtemp(prefix="diffscale-tune-")
    tuner = tune.Tuner(
        tune.with_resources(trial, {"node:__internal_head__": 0.001}),
        param_space=space,
        tune_config=TuneConfig(
            metric="value",
            mode="max" if ledger.higher_is_better else "min",
            num_samples=1 if search is None else samples,
            search_alg=search,
            max_concurrent_trials=ledger.sweep.max_concurrent if search is None else None,
        ),
        run_config=RunConfig(
            name="trials",
            storage_path=folder,
            failure_config=FailureConfig(max_failures=2),
            verbose=0,
        ),
    )
    results = tuner.fit()
    failed = {}
    for index in range(len(results)):
        result = results[index]
        if result.error is not None:
            config = result.config or {}
            point = json.loads(config["point"]) if "point" in config else _decode(ledger.sweep, config)
            failed[point_id(point)] = str(result.error).strip().splitlines()[-1]
    return failed


def run_trial(sweep: Sweep, config: dict[str, Any], flops: float | None) -> None:
    """One trial, in its own process: every replicate in turn, then the metric to Ray Tune."""
    from ray import tune

    from diffscale import train

    ledger = Ledger(sweep)
    point = json.loads(config["point"]) if "point" in config else _decode(sweep, config)
    trial = ledger.trial(point)
    worst = float("-inf") if ledger.higher_is_better else float("inf")
    if trial is None:
        tune.report({"value": worst, "note": "ruled out by a constraint"})
        return
    over = ledger.over_budget([t for t in map(ledger.trial, ledger.begun()) if t is not None])
    if over and not ledger.records(trial):
        tune.report({"value": worst, "note": over})
        return
    ledger.note_begun(point)
    stopped = False
    for experiment in trial.experiments:
        if flops is not None:
            experiment = with_budget(experiment, flops)
        should_stop = AshaRule(sweep, trial.id) if sweep.scheduler.name == "asha" else None
        result = train.run(experiment, should_stop=should_stop, show=False)
        stopped |= result.stopped
    if flops is None:
        ledger.note_ended(trial.id, "stopped" if stopped else "finished")
    value = ledger.value(trial, flops)
    tune.report({"value": worst if value is None else value, "trial": trial.id})


def with_budget(experiment: Experiment, flops: float) -> Experiment:
    train_settings = experiment.train.model_copy(update={"flops": flops})
    return experiment.model_copy(update={"train": train_settings})


@dataclass(frozen=True)
class AshaRule:
    """`should_stop` of a trial under ASHA: at each rung, go on only among the best of those that have reached it.

    The decision is written when it is made, so a resumed sweep keeps it.
    """

    sweep: Sweep
    trial_id: str

    def __call__(self, record: Any) -> bool:
        ledger = Ledger(self.sweep)
        rungs = self.sweep.scheduler.rungs_flops
        reached = [i for i, flops in enumerate(rungs[:-1]) if record.train_flops >= flops * (1 - 1e-9)]
        if record.metric != ledger.metric or not reached:
            return False
        rung = reached[-1]
        earlier = ledger.decisions.get(rung, self.trial_id)
        if earlier is None:
            trials = [t for t in map(ledger.trial, ledger.begun()) if t is not None]
            values = {t.id: ledger.value(t, rungs[rung]) for t in trials} | {self.trial_id: record.value}
            known = {name: value for name, value in values.items() if value is not None}
            keep = promoted(known, self.sweep.scheduler.reduction, ledger.higher_is_better)
            earlier = ledger.decisions.put(rung, self.trial_id, self.trial_id in keep, record.value)
        return not earlier


# ---- results


def _write_results(ledger: Ledger, trials: list[Trial], best: Trial | None) -> None:
    """trials.csv, importance.csv and, as a preset that `diffscale.train` takes, best.yaml."""
    import pandas as pd

    rows = []
    for trial in trials:
        records = ledger.records(trial)
        last = records[-1] if records else None
        rows.append(
            {
                "trial": trial.id,
                **trial.point,
                "end": ledger.ended(trial.id) or "",
                ledger.metric: ledger.value(trial),
                "train_flops": last.train_flops if last else None,
                "device_seconds": last.device_seconds if last else None,
                "runs": " ".join(trial.folders),
            }
        )
    storage.write_bytes(storage.join(ledger.folder, "trials.csv"), pd.DataFrame(rows).to_csv(index=False).encode())
    # Trials that were stopped early are compared where all of them were evaluated: at the first rung.
    rung = ledger.sweep.scheduler.rungs_flops[0] if ledger.sweep.scheduler.name != "none" else None
    valued = [(overrides_of(ledger.sweep, t.point), ledger.value(t, rung)) for t in trials]
    known = [(p, v) for p, v in valued if v is not None]
    table = importance([p for p, _ in known], [v for _, v in known])
    storage.write_bytes(storage.join(ledger.folder, "importance.csv"), table.to_csv(index=False).encode())
    if best is not None:
        settings = best.experiments[0].model_dump(mode="json", exclude={"storage"})
        text = f"# Best of sweep {ledger.sweep.name} by {ledger.metric}: {ledger.value(best):.6g}\n"
        text += yaml.safe_dump(validate(settings).model_dump(mode="json", exclude={"storage"}), sort_keys=False)
        storage.write_bytes(storage.join(ledger.folder, "best.yaml"), text.encode())


if __name__ == "__main__":
    run_app(app)
