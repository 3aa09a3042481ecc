"""The state of a sweep, in its folder and in its runs' records: JSON and YAML that a resumed sweep continues from.

STORAGE/sweeps/NAME-<sweep_id>/
  sweep.yaml            the sweep's settings       trials/<point_id>.json      a point that was started
  ended/<point_id>.json how that trial ended       decisions/rung-R/*.json     which trials continue
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import yaml

from diffscale.config.experiment import Experiment
from diffscale.config.factory import open_training_data
from diffscale.config.load import load_tree, merge, validate
from diffscale.core import storage
from diffscale.core.errors import UserError
from diffscale.core.hashing import identify
from diffscale.evaluation.evaluator import reference_dataset
from diffscale.evaluation.metrics.registry import recorded_name
from diffscale.records.schema import Record, higher_is_better, rank
from diffscale.records.store import read_records
from diffscale.sweep.decisions import Decisions
from diffscale.sweep.settings import Sweep
from diffscale.sweep.space import Point, nest, overrides_of, point_id, satisfies
from diffscale.training.initial_weights import with_initial_weights
from diffscale.training.numerics import settled
from diffscale.training.own_records import is_own
from diffscale.training.plan import make_plan

End = Literal["finished", "stopped", "diverged", "refused"]
VALIDATION_LOSS = "val_loss"
"""The name of the validation loss as a metric of a sweep: each row of a record has it."""
WITHOUT_VALUE = ("diverged", "refused")
"""Ends of trials that count as the worst value: they lost their weights, or their settings cannot train."""


@dataclass(frozen=True)
class Trial:
    """One point of the sweep: an experiment for each replicate seed."""

    id: str
    point: Point
    experiments: tuple[Experiment, ...]

    @cached_property
    def folders(self) -> tuple[str, ...]:
        """Folders of the runs, in the order of the experiments."""
        dataset = open_training_data(self.experiments[0])
        return tuple(
            with_initial_weights(settled(e, dataset), dataset).run_folder(dataset.content_hash)
            for e in self.experiments
        )


class Ledger:
    """A sweep's trials, and what has happened to them.

    over: nested settings over those of the sweep and of every point.
    """

    def __init__(self, sweep: Sweep, over: dict[str, Any] | None = None) -> None:
        self.sweep, self.over = sweep, over or {}
        self.base = load_tree(sweep.base)
        self.common = self._experiment(sweep.overrides)  # settings that no point varies
        metrics, resize = self.common.eval.metrics, self.common.eval.resize
        if not metrics or not self.common.eval.n_generated:
            key = "eval.n_generated" if metrics else "eval.metrics"
            value = self.common.dotted()[key]
            raise UserError(setting=key, value=value, expected="what the sweep compares its trials by")
        chosen = sweep.metric or metrics[0]
        if chosen not in (*metrics, VALIDATION_LOSS):
            expected = f"{VALIDATION_LOSS}, or one of eval.metrics: {', '.join(metrics)}"
            raise UserError(setting="metric", value=chosen, expected=expected)
        by_loss = chosen == VALIDATION_LOSS
        self.metric = VALIDATION_LOSS if by_loss else recorded_name(chosen, resize)
        self.rows_metric = recorded_name(metrics[0], resize) if by_loss else self.metric  # whose rows have the value
        self.higher_is_better = higher_is_better(self.metric)
        what = sweep.model_dump(mode="json", exclude={"max_concurrent", "budget"})
        self.sweep_id = identify(base_settings=self.base, **what)
        self.folder = storage.join(
            storage.check_absolute(self.common.storage), "sweeps", f"{sweep.name}-{self.sweep_id}"
        )
        self.decisions = Decisions(self.folder)
        self._ends: dict[str, End] = {}

    def begin(self) -> None:
        """Write the sweep's settings into its folder."""
        text = yaml.safe_dump(self.sweep.model_dump(mode="json"), sort_keys=False)
        storage.write_bytes(storage.join(self.folder, "sweep.yaml"), text.encode())

    # ---- trials

    def trial(self, point: Point) -> Trial | None:
        """Return the trial of a point, or None if a constraint rules it out."""
        overrides = overrides_of(self.sweep, point)
        first = self._experiment(overrides)
        if not all(satisfies(c, first.model_dump(mode="json")) for c in self.sweep.constraints):
            return None
        seeds = range(first.train.seed, first.train.seed + self.sweep.replicates)
        return Trial(point_id(point), point, tuple(self.experiment(point, seed) for seed in seeds))

    def experiment(self, point: Point, seed: int, over: dict[str, Any] | None = None) -> Experiment:
        """Return the run of a point with a training seed. over: dotted keys over those of the point."""
        overrides = overrides_of(self.sweep, point) | {"train.seed": seed}
        return self._experiment(overrides, over or {}, self.sweep.run_name(point))

    def _experiment(self, overrides: dict[str, Any], over: dict[str, Any] | None = None, name: str = "") -> Experiment:
        tree = merge(self.base, nest(overrides | self._limits(overrides) | (over or {})))
        return validate(merge(tree, self.over) | {"name": name or self.sweep.name})

    def _limits(self, overrides: dict[str, Any]) -> dict[str, Any]:
        """Return the settings that end and evaluate a trial: its budget, or the rungs of the scheduler."""
        limits: dict[str, Any] = {}
        budget, scheduler = self.sweep.budget.trial, self.sweep.scheduler
        for key in ("flops", "images", "device_seconds"):
            if getattr(budget, key) is not None:
                limits[f"train.{key}"] = getattr(budget, key)
        if budget.money is not None:
            limits["train.device_seconds"] = self._seconds_for(budget.money, overrides)
        if scheduler.name != "none":
            limits |= {"train.flops": scheduler.rungs_flops[-1], "eval.points": []}
            limits["eval.points_flops"] = list(scheduler.rungs_flops)
        if "train.flops" in limits and "train.images" not in limits:
            limits["train.images"] = None
        return limits

    def _seconds_for(self, money: float, overrides: dict[str, Any]) -> float:
        price = overrides.get("train.price_per_device_hour", self.base.get("train", {}).get("price_per_device_hour"))
        if not price:
            raise UserError(
                setting="budget.money", value=money, expected="a price: set train.price_per_device_hour as well"
            )
        return money / float(price) * 3600

    @property
    def one_worker(self) -> bool:
        """Return whether every trial is a run of one worker on the same kind of device."""
        varied = {*self.sweep.space} | {key for settings in self.sweep.variants.values() for key in settings}
        fixed = {"train", "train.workers", "train.cpus_per_worker", "train.gpu"}.isdisjoint(varied)
        return fixed and self.common.train.workers == 1

    # ---- what happened

    def begun(self) -> list[Point]:
        """Return every point that was started, in the order of the files' names."""
        files = storage.list_files(storage.join(self.folder, "trials"), ".json")
        return [json.loads(storage.read_bytes(f)) for f in files]

    def begun_trials(self) -> list[Trial]:
        """Return the trial of every point that was started."""
        return [t for t in map(self.trial, self.begun()) if t is not None]

    def begun_ids(self) -> set[str]:
        """Return the ids of the trials that were started, with one listing."""
        return self._ids("trials")

    def ended_ids(self) -> set[str]:
        """Return the ids of the trials that have ended, with one listing."""
        return self._ids("ended")

    def _ids(self, what: str) -> set[str]:
        files = storage.list_files(storage.join(self.folder, what), ".json")
        return {file.rpartition("/")[2].removesuffix(".json") for file in files}

    def note_begun(self, point: Point) -> None:
        """Record that the trial of a point was started."""
        storage.write_bytes(storage.join(self.folder, "trials", f"{point_id(point)}.json"), json.dumps(point).encode())

    def ended(self, trial_id: str) -> End | None:
        """Return how a trial ended, or None. An end is final: it is read once."""
        if trial_id not in self._ends:
            uri = storage.join(self.folder, "ended", f"{trial_id}.json")
            if not storage.exists(uri):
                return None
            self._ends[trial_id] = json.loads(storage.read_bytes(uri))["end"]
        return self._ends[trial_id]

    def note_ended(self, trial_id: str, end: End) -> None:
        """Record how a trial ended."""
        storage.write_bytes(storage.join(self.folder, "ended", f"{trial_id}.json"), json.dumps({"end": end}).encode())

    def records(self, trial: Trial) -> list[Record]:
        """Return the rows of a trial in the compared metric, ordered by compute.

        They are those of the trial's own evaluation settings: later evaluations of a run are of another group.
        """
        rows = [row for runs in self._runs(trial) for row in runs]
        return sorted(rows, key=lambda r: r.train_flops)

    def _runs(self, trial: Trial) -> list[list[Record]]:
        """Return the rows of each replicate up to its budget, ordered by compute.

        A command with a larger budget continues the same run, and its rows are not the trial's.
        """
        found = []
        for folder, experiment in zip(trial.folders, trial.experiments, strict=True):
            rows = read_records([folder]) if storage.exists(folder) else []
            own = [r for r in rows if r.metric == self.rows_metric and is_own(r, experiment)]
            own.sort(key=lambda r: r.train_flops)
            ends = (n for n, r in enumerate(own) if _is_end(r, experiment))
            found.append(own[: next(ends, len(own)) + 1])
        return found

    def measured(self, row: Record) -> float:
        """Return the compared metric of a row; nan for a validation loss that it does not have."""
        if self.metric != VALIDATION_LOSS:
            return row.value
        return math.nan if row.val_loss is None else row.val_loss

    def value(self, trial: Trial, flops: float | None = None) -> float | None:
        """Return the metric (mean over the replicates) at a rung or at the end; None until every replicate has it.

        It is nan, the worst value, if a replicate diverged or the settings of the trial cannot train.
        """
        if self.ended(trial.id) in WITHOUT_VALUE:
            return math.nan
        values = []
        for rows in self._runs(trial):
            reached = [r for r in rows if flops is None or r.train_flops >= flops * (1 - 1e-9)]
            if not reached:
                return None
            values.append(self.measured(reached[-1 if flops is None else 0]))
        return sum(values) / len(values) if values else None

    def spent(self, trials: list[Trial]) -> dict[str, float]:
        """Return the cost of all runs so far, read from the newest record of each."""
        total = {"flops": 0.0, "images": 0.0, "device_seconds": 0.0, "money": 0.0}
        for trial in trials:
            for rows in self._runs(trial):
                if rows:
                    last = rows[-1]
                    total["flops"] += last.train_flops
                    total["images"] += last.images_seen
                    total["device_seconds"] += last.device_seconds
                    total["money"] += last.cost or 0.0
        return total

    def over_budget(self) -> str | None:
        """Return the exhausted limit of the whole sweep as a sentence, or None. Without a limit nothing is read."""
        limits = self.sweep.budget.total.model_dump(exclude_none=True)
        spent = self.spent(self.begun_trials()) if limits else {}
        for key, limit in limits.items():
            if spent[key] >= limit:
                return f"budget.total.{key} = {limit:g} is used up ({spent[key]:g})"
        return None

    def best(self, trials: list[Trial]) -> Trial | None:
        """Return the best of the trials that reached the highest rung; values at a lower rung do not compete."""
        reached: dict[str, tuple[float, float]] = {}
        for trial in trials:
            rows, value = self.records(trial), self.value(trial)
            if rows and value is not None and math.isfinite(value):
                compute = self._rung(rows[-1].train_flops)
                reached[trial.id] = (-compute, rank(self.metric, value))
        return min((t for t in trials if t.id in reached), key=lambda t: reached[t.id], default=None)

    def _rung(self, flops: float) -> float:
        return max((r for r in self.sweep.scheduler.rungs_flops if flops >= r * (1 - 1e-9)), default=0.0)

    def known_values(self, trials: list[Trial], flops: float | None = None) -> dict[str, float]:
        """Return the finite value of each trial that has one, by its id; a diverged trial has the worst of them."""
        values = {t.id: v for t in trials if (v := self.value(t, flops)) is not None}
        finite = [value for value in values.values() if math.isfinite(value)]
        worst = max(finite, key=lambda value: rank(self.metric, value), default=math.nan)
        known = {name: value if math.isfinite(value) else worst for name, value in values.items()}
        return known if finite else {}


def check_comparable(sweep: Sweep, trials: list[Trial]) -> None:
    """Raise UserError for a sweep whose trials' values would be of several groups (CONTRIBUTING.md, decision 1)."""
    resolutions = {t.experiments[0].data.resolution for t in trials}
    common = {t.experiments[0].eval.eval_resolution for t in trials}
    if len(resolutions) > 1 and (len(common) > 1 or None in common):
        raise UserError(
            setting="eval.eval_resolution",
            value=sorted(common, key=str),
            expected=f"one resolution for all trials, which train at {sorted(resolutions)}: distances at different "
            "resolutions cannot be compared",
            fix=f"eval.eval_resolution={max(resolutions)}",
        )
    for setting, values in _groups(trials).items():
        different = list(dict.fromkeys(values))
        if len(different) > 1:
            raise UserError(
                setting=setting,
                value=different[:5],
                expected="one value for all trials: their distances are compared",
                reason="values of another number of samples, sampler or reference are of another group",
                fix="evaluate the runs with other settings after the sweep: diffscale evaluate RUN eval.KEY=VALUE",
            )


GROUPING = (
    "n_generated",
    "n_reference",
    "resize",
    "solver",
    "guidance_scale",
    "guidance_interval",
    "guidance_state",
    "guidance_channels",
)
"""Settings of `eval` that decide the comparability group of a value."""


def _groups(trials: list[Trial]) -> dict[str, list[str]]:
    """Return what decides the comparability group of each trial's values, by the setting that decides it."""
    groups: dict[str, list[str]] = {}
    contents: dict[tuple[str, int], str] = {}
    for experiment in (trial.experiments[0] for trial in trials):
        settings = experiment.eval
        for key in GROUPING:
            groups.setdefault(f"eval.{key}", []).append(str(getattr(settings, key)))
        place = experiment.data.path, settings.eval_resolution or experiment.data.resolution
        if place not in contents:
            contents[place] = reference_dataset(experiment, open_training_data(experiment)).content_hash
        groups.setdefault("data.path", []).append(contents[place])
    return groups


def _is_end(row: Record, experiment: Experiment) -> bool:
    """Return whether the run has used its budget at a row."""
    return make_plan(experiment, row.flops_per_image).finished(row.images_seen, row.device_seconds)
