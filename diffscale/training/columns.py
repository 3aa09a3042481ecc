"""Those of a record's columns that training determines: also kept in each checkpoint, for later evaluations."""

from __future__ import annotations

from typing import Any

from diffscale.config.experiment import Experiment
from diffscale.core.device import Cost, device_name, money
from diffscale.core.provenance import source, versions
from diffscale.data import Dataset
from diffscale.training.parallel import World


def run_columns(
    experiment: Experiment,
    dataset: Dataset,
    cost: Cost,
    world: World,
    images_seen: int,
    device_seconds: float,
    energy_joules: float | None,
    train_loss: float | None,
    precision: str,
    launches: int,
) -> dict[str, Any]:
    """By column name, plain JSON values. Training is one device per worker; precision: what "auto" came to."""
    d, train = experiment.diffusion, experiment.train
    commit, dirty = source()
    path = experiment.data.path
    return {
        "run_id": experiment.run_id(dataset.content_hash), "run_name": experiment.name, "model": experiment.model.name,
        "parameters": cost.parameters, "schedule": d.schedule.name, "interpolant": d.interpolant,
        "prediction": d.prediction, "weighting": d.weighting.name, "input_scale": d.input_scale,
        "dataset": path if ":" in path and "/" not in path else path.rstrip("/").rpartition("/")[2],
        "dataset_hash": dataset.content_hash, "dataset_lossy": dataset.lossy, "train_resolution": dataset.resolution,
        "seed": train.seed, "global_batch": train.global_batch, "precision": precision,
        "images_seen": images_seen, "epochs": images_seen / dataset.n, "endpoint": experiment.endpoint(images_seen),
        "forward_macs": cost.forward_macs, "flops_per_image": cost.flops_per_image,
        "train_flops": cost.flops_per_image * images_seen, "device_seconds": device_seconds,
        "device": device_name(world.device), "devices": world.size, "launches": launches,
        "energy_joules": energy_joules,
        "cost": money(device_seconds, train.price_per_device_hour), "train_loss": train_loss,
        "commit": commit, "dirty": dirty, "versions": versions(), "settings": experiment.dotted(),
    }  # fmt: skip
