"""The result row: one metric of one evaluation of one checkpoint, with what made it and what it cost.

Rows are read and written in records/store.py; README.md in this folder lists the columns.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from functools import cache
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from diffscale.core.hashing import identify

SCHEMA_VERSION = 1

Endpoint = Literal["constant", "inverse_sqrt", "decayed", "mid_decay"]


class Record(BaseModel):
    """One row. The order of the fields is the order of the CSV's columns."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=True, frozen=True)

    schema_version: int = Field(SCHEMA_VERSION, description="version of this table")
    record_id: str = Field(description="hash of run_id, images_seen, EMA, sampler, n, sample seed, reference, metric")
    run_id: str = Field(description="hash of everything that changes the weights")
    run_name: str = Field(description="the run's name")
    created: str = Field(description="UTC time of the evaluation, ISO 8601")

    model: str = Field(description="backbone: unet, edm2, uvit, rin, dit, jit, hdit")
    parameters: int = Field(description="trainable parameters")
    schedule: str = Field(description="noise schedule")
    interpolant: str = Field(description="vp, linear or ve")
    prediction: str = Field(description="eps, x0, v, u or F")
    weighting: str = Field(description="loss weighting")
    input_scale: float = Field(description="Chen's b")
    dataset: str = Field(description="name of the training set")
    dataset_hash: str = Field(description="content hash of the training images")
    dataset_lossy: bool = Field(description="a source was lossy (JPEG), which limits FID")
    train_resolution: int = Field(description="side in pixels of the training images")
    crop: str | None = Field(None, description="how a build cropped the training images: center, adm or none")
    seed: int = Field(description="training seed")
    global_batch: int = Field(description="images per optimisation step")
    precision: str = Field(description="bf16, fp16, tf32 or fp32")

    images_seen: int = Field(description="training images so far, the run's clock")
    epochs: float = Field(description="images_seen / images in the training set")
    endpoint: Endpoint = Field(
        description="state of the learning rate at this checkpoint: constant, inverse_sqrt, decayed, mid_decay"
    )
    ema: str = Field(description="which weights: none, halflife, std0.050, ...")
    forward_macs: float = Field(description="multiply-adds of one forward pass of one image")
    flops_per_image: float = Field(description="counted FLOPs to train on one image (forward + backward)")
    train_flops: float = Field(description="flops_per_image times images_seen: the compute axis")
    device_seconds: float = Field(description="seconds of training times devices, without evaluation")
    device: str = Field(description="kind of device that trained it")
    devices: int = Field(description="number of devices")
    launches: int | None = Field(None, description="launches of the training so far, resumptions included")
    energy_joules: float | None = Field(None, description="joules measured by NVML; empty if it is unavailable")
    cost: float | None = Field(None, description="device-hours times the price in the settings")
    train_loss: float | None = Field(None, description="mean training loss since the last evaluation")
    val_loss: float | None = Field(None, description="loss on held-out images with fixed noise")
    val_loss_by_logsnr: list[float] | None = Field(None, description="the same in quartiles of logsnr, low to high")

    metric: str = Field(description="fid, kid, fd_efficientnet_lite0, precision, ...; `fid` is always Inception's")
    value: float = Field(description="distance of the samples to the training images at eval_resolution")
    value_low: float | None = Field(None, description="lower end of the 95 % interval")
    value_high: float | None = Field(None, description="upper end of the 95 % interval")
    value_heldout: float | None = Field(None, description="the same distance to held-out images")
    value_native: float | None = Field(None, description="the same distance at the training resolution")
    memorisation: float | None = Field(
        None, description="share of samples nearer to a training image than 1 % of unseen images are"
    )
    network: str = Field(description="feature network")
    resize: str = Field(description="method that resizes images to the network's input")
    eval_resolution: int = Field(description="common side in pixels at which samples and reference are compared")
    reference: str = Field(description="hash of the reference images, their resolution and resize")
    n_generated: int = Field(description="generated images")
    n_reference: int = Field(description="reference images")
    reference_file: str | None = Field(
        None, description="name of the file of statistics that was compared with in place of the training images"
    )
    heldout: str | None = Field(None, description="hash of the held-out images, their resolution and resize")
    n_heldout: int | None = Field(None, description="held-out images")
    solver: str = Field(description="sampler")
    nfe: int = Field(description="network evaluations per image")
    guidance_scale: float = Field(1.0, description="1 is no guidance")
    sampler: str = Field(description="all sampler settings, canonical JSON")
    sample_seed: int = Field(description="seed of the samples")
    sample_batch: int | None = Field(None, description="images generated at a time; it changes rounding alone")
    decoder: str | None = Field(
        None, description="autoencoder that decoded the samples of a model of latents, with 8 digits of its hash"
    )
    sampling_flops: float = Field(description="FLOPs to generate one image")
    evaluated_on: Literal["training workers", "own workers"] = Field(description="which processes ran the evaluation")
    warning: str = Field("", description="caveats of this value")

    commit: str = Field(description="source commit, or hash of the package source")
    dirty: bool = Field(description="uncommitted changes were present")
    versions: dict[str, str] = Field(description="versions of diffscale, torch, ray, timm, ...")
    settings: dict[str, Any] = Field(description="every setting of the run, dotted")


GROUP = [
    "network",
    "reference",
    "eval_resolution",
    "resize",
    "n_generated",
    "n_reference",
    "sampler",
    "metric",
]
"""Values are comparable only where all of these columns agree (CONTRIBUTING.md, decision 1)."""

HIGHER_IS_BETTER = (
    "is",
    "inception_score",
    "isc",
    "precision",
    "recall",
    "f_score",
    "density",
    "coverage",
    "preference",
)
"""Kinds of metrics of which a larger value is better; of distances, losses and memorisation a smaller one is."""

_HIGHER = re.compile(f"({'|'.join(HIGHER_IS_BETTER)})(_|$)")
_CLASS = re.compile(r"\[[^\]]*\]$")


def higher_is_better(metric: str) -> bool:
    """Return the direction of a metric by the name under which it is recorded.

    metric: a kind with its network, method of resizing and class, such as `fid`, `f_score`, `is_clean`,
        `precision_dinov2_vitl14` or `density[3]`. A row `<metric>_std` is a spread, of which less is better.
    """
    name = _CLASS.sub("", metric)
    return not name.endswith("_std") and _HIGHER.match(name) is not None


def rank(metric: str, value: float) -> float:
    """Return a number that is smaller for a better value of a metric, and infinite for one that is not finite.

    Whatever chooses a best value orders by it: a diverged run is the worst, never the best.
    """
    if not math.isfinite(value):
        return math.inf
    return -value if higher_is_better(metric) else value


RECIPE_FIELDS = (
    "data.resolution",
    "data.class_conditional",
    "data.flip",
    "data.augment",
    "data.order",
    "data.lanes",
    "data.decoder",
    "model",
    "diffusion",
    "optim",
    "train.global_batch",
    "train.precision",
    "train.winograd",
    "train.ema",
    "train.init_weights",
    "train.init_skip",
    "peer",
)
"""Settings, or sections of settings, that make a recipe: runs of one recipe differ by seed, length and place alone.

`peer` is what a benchmark set for another project's trainer.
`Experiment.run_id` hashes these and what else changes the weights of one run: the seed, and how torch computes.
"""


ADDED_SETTINGS: dict[str, Any] = {
    "data.lanes": 1024,
    "model.start": "small_time",
    "model.zero_writes": False,
    "model.write_heads": 0,
    "model.gated_writes": False,
    "model.rw_positions": False,
    "model.qk_norm": False,
    "model.time_on_tiles": False,
    "model.tile_conv": 0,
    "model.late_latents": 0,
    "optim.decay_on": "weights",
    "optim.trust_ratio": "decayed",
    "model.resample_padding": "both",
    "diffusion.discrete": False,
    "diffusion.variance": "fixed",
    "diffusion.vlb_weight": 0.001,
    "train.ema.ramp": 0.05,
    "train.init_weights": None,
    "train.init_skip": [],
}
"""Settings that came after runs had been identified without them, with the default that changes nothing.

At that default a setting is no part of `run_id` and of a recipe, so runs and records from before keep theirs.
"""


def recipe_of(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the dotted settings that make a run's recipe, of all its dotted settings."""
    return {key: value for key, value in settings.items() if _makes_recipe(key) and not is_as_before(key, value)}


@cache
def _makes_recipe(key: str) -> bool:
    return any(key == field or key.startswith(f"{field}.") for field in RECIPE_FIELDS)


def is_as_before(key: str, value: Any) -> bool:
    """Return whether a dotted setting is a later one at the default that changes nothing."""
    return key in ADDED_SETTINGS and ADDED_SETTINGS[key] == value


def columns_table() -> str:
    """Return the columns of a record and their meaning as a Markdown table."""
    rows = [f"| `{name}` | {field.description} |" for name, field in Record.model_fields.items()]
    return "\n".join(["| column | meaning |", "|---|---|", *rows])


def record_id(
    *,
    run_id: str,
    images_seen: int,
    ema: str,
    sampler: str,
    n_generated: int,
    sample_seed: int,
    reference: str,
    metric: str,
    eval_resolution: int,
    n_heldout: int | None = None,
    decoder: str | None = None,
) -> str:
    """Return the identity of a row: what was evaluated and how, without the outcome.

    n_heldout: number of held-out images where `eval.n_heldout` limits it; None for all of them.
    decoder: of a model of latents.
    """
    younger = {"n_heldout": n_heldout, "decoder": decoder}  # than the first records
    return identify(
        run_id=run_id,
        images_seen=images_seen,
        ema=ema,
        sampler=sampler,
        n=n_generated,
        seed=sample_seed,
        reference=reference,
        metric=metric,
        eval_resolution=eval_resolution,
        **{name: value for name, value in younger.items() if value is not None},
    )
