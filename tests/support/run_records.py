"""Records as the evaluation of a run's own settings writes them, without any training."""

from __future__ import annotations

from diffscale.config.experiment import Experiment
from diffscale.records.schema import Record
from diffscale.training.ema import ema_name
from diffscale.training.own_records import first_metric, own_sampling
from tests.records.test_store import make


def own_record(experiment: Experiment, value: float, **changes: object) -> Record:
    """Return the first metric's record of a run's own evaluation. changes: columns of another evaluation."""
    settings = experiment.eval
    sampling = own_sampling(experiment, "fp32")
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
