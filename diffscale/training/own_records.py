"""Which records of a run are of its own evaluation settings: the only ones that "best" and a sweep compare.

A run's folder also holds records of later evaluations: other numbers of samples, samplers, averages or references.
Their values are not comparable with the run's own (CONTRIBUTING.md, decision 1).
"""

from __future__ import annotations

import math
from collections.abc import Iterable

from diffscale.config.experiment import Experiment
from diffscale.config.factory import build_solver
from diffscale.evaluation.metrics.registry import recorded_name
from diffscale.evaluation.published import statistics_name
from diffscale.evaluation.sampling import Sampling, sampling_of_settings, sampling_precision
from diffscale.records.schema import Record
from diffscale.records.store import records_of_run
from diffscale.training.checkpoint import layout as ck
from diffscale.training.checkpoint.tensors import group_files
from diffscale.training.ema import ema_name

REFERENCE_SIZE = "eval.n_reference"


def first_metric(experiment: Experiment) -> str:
    """Return the name under which the first of `eval.metrics` is recorded; empty without metrics."""
    metrics = experiment.eval.metrics
    return recorded_name(metrics[0], experiment.eval.resize) if metrics else ""


def own_sampling(experiment: Experiment, precision: str) -> Sampling:
    """Return the sampler of a run's own evaluations."""
    settings, solver = experiment.eval, build_solver(experiment)
    return sampling_of_settings(
        settings, solver, settings.n_generated, precision, carries_state=experiment.carries_state
    )


def is_own(record: Record, experiment: Experiment) -> bool:
    """Return whether a record is of the evaluation that the run's settings describe, in every column of its group.

    Metrics that a later evaluation added under the same settings count as well.
    """
    settings, sampling = experiment.eval, own_sampling(experiment, sampling_precision(record.precision))
    return (
        record.n_generated == settings.n_generated
        and record.ema == ema_name(settings.ema)
        and record.sampler == sampling.canonical()
        and record.sample_seed == settings.seed
        and record.resize == settings.resize
        and record.eval_resolution == (settings.eval_resolution or record.train_resolution)
        and record.reference_file == (None if settings.reference is None else statistics_name(settings.reference))
        and (REFERENCE_SIZE, settings.n_reference) in record.settings.items()
    )


def evaluated_points(run_folder: str, experiment: Experiment) -> dict[int, float]:
    """Return the images seen at which there are records, with the first metric's value under the run's own settings.

    The value is nan where the checkpoint was evaluated under other settings only. Raises UserError that names a damaged
    record.
    """
    found: dict[int, float] = {}
    metric = first_metric(experiment)
    for record in records_of_run(run_folder):
        value = record.value if record.metric == metric and is_own(record, experiment) else math.nan
        if math.isnan(found.get(record.images_seen, math.nan)):
            found[record.images_seen] = value
    return found


def missing_points(
    run_folder: str, experiment: Experiment, points: Iterable[int], done: Iterable[int] = ()
) -> list[int]:
    """Return the points whose weights are kept and that have no record, oldest first, without those in `done`."""
    if not experiment.eval.metrics:
        return []
    left = {*points} - {*done} - {*evaluated_points(run_folder, experiment)}
    return [i for c in ck.list_checkpoints(run_folder) if (i := ck.images_of(c)) in left and group_files(c, "model")]
