"""The columns of a record: those that training determines, and a row of training, evaluation and sampling together."""

from __future__ import annotations

import datetime as dt
from typing import Any

from diffscale.config.experiment import Experiment
from diffscale.core.device import device_name, money
from diffscale.core.provenance import source, versions
from diffscale.data import Dataset
from diffscale.data.autoencoder import Decoder
from diffscale.diffusion import Diffusion
from diffscale.evaluation import Measurement, Sampling
from diffscale.models.cost import Cost
from diffscale.records.schema import Record, record_id
from diffscale.training.ema import ema_name
from diffscale.training.parallel import World

HELDOUT_SIZE = "eval.n_heldout"


def dataset_name(path: str) -> str:
    """Return the name under which a dataset is recorded: the last part of its path, or builtin:NAME."""
    return path if ":" in path and "/" not in path else path.rstrip("/").rpartition("/")[2]


def record_columns(
    experiment: Experiment,
    dataset: Dataset,
    cost: Cost,
    world: World,
    images_seen: int,
    device_seconds: float,
    energy_joules: float | None,
    train_loss: float | None,
    precision: str,
    launches: int | None,
) -> dict[str, Any]:
    """Return the columns of a record that training determines, by name, as plain JSON values.

    They are kept in each checkpoint too, for later evaluations. Training uses one device per worker.

    precision: what the run computes in ("auto" resolved).
    launches: number of times that training was started or resumed.
    """
    d, train = experiment.diffusion, experiment.train
    commit, dirty = source()
    return {
        "run_id": experiment.run_id(dataset.content_hash),
        "run_name": experiment.name,
        "model": experiment.model.name,
        "parameters": cost.parameters,
        "schedule": d.schedule.name,
        "interpolant": d.interpolant,
        "prediction": d.prediction,
        "weighting": d.weighting.name,
        "input_scale": d.input_scale,
        "dataset": dataset_name(experiment.data.path),
        "dataset_hash": dataset.content_hash,
        "dataset_lossy": dataset.lossy,
        "train_resolution": dataset.image_resolution,
        "crop": dataset.manifest.resize.get("crop"),
        "seed": train.seed,
        "global_batch": train.global_batch,
        "precision": precision,
        "images_seen": images_seen,
        "epochs": images_seen / dataset.n,
        "endpoint": experiment.endpoint(images_seen),
        "forward_macs": cost.forward_macs,
        "flops_per_image": cost.flops_per_image,
        "train_flops": cost.flops_per_image * images_seen,
        "device_seconds": device_seconds,
        "device": device_name(world.device),
        "devices": world.size,
        "launches": launches,
        "energy_joules": energy_joules,
        "cost": money(device_seconds, train.price_per_device_hour),
        "train_loss": train_loss,
        "commit": commit,
        "dirty": dirty,
        "versions": versions(),
        "settings": experiment.dotted(),
    }


def with_evaluation_settings(columns: dict[str, Any], experiment: Experiment, ema: str) -> dict[str, Any]:
    """Return a record's columns whose settings are those of the training, and of `eval` those of this evaluation.

    ema: name of the weights that are evaluated.
    """
    ours = {key: value for key, value in experiment.dotted().items() if key.startswith("eval.")}
    if ema_name(experiment.eval.ema) != ema:
        ours["eval.ema"] = ema
    trained = {key: value for key, value in columns["settings"].items() if not key.startswith("eval.")}
    return columns | {"settings": trained | ours}


def make_record(
    columns: dict[str, Any],
    measurement: Measurement,
    sampling: Sampling,
    diffusion: Diffusion,
    ema: str,
    decoder: Decoder | None = None,
) -> Record:
    """Build one record from the columns that training, evaluation and sampling each determine."""
    name = None if decoder is None else decoder.name
    fields = measurement.fields() | sampling.fields(diffusion)
    identity = record_id(
        run_id=columns["run_id"],
        images_seen=columns["images_seen"],
        ema=ema,
        sampler=fields["sampler"],
        n_generated=fields["n_generated"],
        sample_seed=fields["sample_seed"],
        reference=fields["reference"],
        metric=fields["metric"],
        eval_resolution=fields["eval_resolution"],
        n_heldout=columns["settings"].get(HELDOUT_SIZE),  # a peer of a benchmark has no settings of ours
        decoder=name,
    )
    created = dt.datetime.now(dt.UTC).isoformat(timespec="seconds")
    flops = sampling.flops(diffusion, columns["forward_macs"]) + (0 if decoder is None else decoder.flops)
    return Record(record_id=identity, created=created, ema=ema, sampling_flops=flops, decoder=name, **columns, **fields)
