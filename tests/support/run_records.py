"""Records as the evaluation of a run's own settings writes them, without any training."""

from __future__ import annotations

from diffscale.config.experiment import Experiment
from diffscale.config.factory import build_solver
from diffscale.evaluation.sampling import sampling_of_settings
from diffscale.records.schema import Record
from diffscale.training.ema import ema_name
from diffscale.training.own_records import first_metric
from tests.records.test_store import make


def own_record(experiment: Experiment, value: float, **changes: object) -> Record:
    """Return the first metric's record of a run's own evaluation. changes: columns of another evaluation."""
    settings = experiment.eval
    sampling = sampling_of_settings(settings, build_solver(experiment), settings.n_generated)
    columns = {
        "run_name": experiment.name,
        "precision": "fp32",
        "ema": ema_name(settings.ema),
        "metric": first_metric(experiment),
        "resize": settings.resize,
        "train_resolution": experiment.data.resolution,
        "eval_resolution": settings.eval_resolution or experiment.data.resolution,
        "n_generated": settings.n_generated,
        "sampler": sampling.canonical(),
        "sample_seed": settings.seed,
        "settings": experiment.dotted(),
        "value": value,
    }
    return make(**columns | changes)
