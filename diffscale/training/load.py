"""Loads trained networks with all that drawing images from them takes: where `sample` and `evaluate` start."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from diffscale.config.experiment import Experiment
from diffscale.config.factory import build_diffusion, open_training_data
from diffscale.config.load import merge, parse_overrides, parse_yaml, validate
from diffscale.core import storage
from diffscale.core.errors import UserError
from diffscale.data import Dataset
from diffscale.diffusion import Diffusion
from diffscale.evaluation import Sampling
from diffscale.training.checkpoint import layout as ck
from diffscale.training.ema import Weights, ema_name
from diffscale.training.numerics import Numerics

CHANGEABLE = ("eval", "storage")


@dataclass(frozen=True)
class TrainedModel:
    """A checkpoint with one average of its weights."""

    experiment: Experiment
    model: nn.Module
    numerics: Numerics  # how the run computes, without compilation
    diffusion: Diffusion
    dataset: Dataset
    images_seen: int
    columns: dict[str, Any]  # the record's columns that training determined
    run_folder: str
    ema: str

    @property
    def weights(self) -> Weights:
        return Weights(self.model, self.ema)

    @property
    def label(self) -> str:
        return f"{self.experiment.name} {self.images_seen:,} images, {self.ema}"


def samples_source(trained: TrainedModel, sampling: Sampling) -> dict[str, Any]:
    """Return what determines sample i of a trained model, to be noted with the samples."""
    return {
        "run_id": trained.columns["run_id"],
        "images_seen": trained.images_seen,
        "ema": trained.ema,
        "sampler": sampling.canonical(),
        "seed": sampling.seed,
    }


def is_run(target: str) -> bool:
    """Return whether the target is a run's folder or one checkpoint of a run."""
    return any(storage.exists(storage.join(target, name)) for name in ("checkpoints", ck.COMPLETE))


def list_targets(target: str, which: str = "last") -> list[str]:
    """Return the checkpoints that a RUN or CHECKPOINT stands for. Raises UserError if there is none.

    which: "last" (the newest undamaged one), "all", or a number of images seen.
    """
    if storage.exists(storage.join(target, ck.COMPLETE)):
        return [target.rstrip("/")]
    if which == "last":
        newest = ck.newest_good(target, for_resuming=False)
        found = [newest] if newest else []
    else:
        found = [c for c in ck.list_checkpoints(target) if which == "all" or str(ck.images_of(c)) == which]
    if not found:
        have = ", ".join(str(ck.images_of(c)) for c in ck.list_checkpoints(target)) or "none"
        raise UserError(setting="checkpoint", value=which, expected=f"last, all, or images seen; {target} has: {have}")
    return found


def settings_of_run(checkpoint: str, overrides: Iterable[str] = (), solver: str | None = None) -> Experiment:
    """Return the run's settings with its `eval` settings overridden: `eval.n_generated=50000`.

    Any other section would make it another run: UserError.

    solver: "heun" or "heun,steps=18", short for the settings of eval.solver.
    """
    changes = parse_overrides(overrides)
    for section in changes:
        if section not in CHANGEABLE:
            raise UserError(
                setting="OVERRIDE",
                value=section,
                expected="eval.* or storage",
                reason="other settings were fixed when the run was trained",
            )
    uri = storage.join(checkpoint, "experiment.yaml")
    tree = merge(parse_yaml(storage.read_bytes(uri).decode(errors="replace"), uri), changes)
    if solver is not None:
        tree = merge(tree, {"eval": {"solver": solver_settings(solver)}})
    return validate(tree)


def solver_settings(text: str) -> dict[str, Any]:
    """Parse `heun,steps=18,grid=karras` as settings."""
    name, *rest = text.split(",")
    return {"name": name, **parse_overrides(rest)}


def load_trained(checkpoint: str, ema: str, experiment: Experiment) -> TrainedModel:
    """Load a checkpoint with the weights of one average.

    Raises UserError for a damaged checkpoint, an average that was not tracked, or missing data.
    """
    _, model, images_seen, columns = ck.load_for_sampling(checkpoint, ema)
    dataset = open_training_data(experiment)
    run_folder = checkpoint.rpartition("/checkpoints/")[0]
    numerics = _numerics_of(run_folder)
    return TrainedModel(
        experiment,
        numerics.prepare(model),
        numerics,
        build_diffusion(experiment, dataset),
        dataset,
        images_seen,
        columns,
        run_folder,
        ema_name(ema),
    )


def _numerics_of(run_folder: str) -> Numerics:
    """Return how the run computed, without compilation, which sampling would wait for; defaults without a file."""
    return replace(Numerics.load(run_folder) or Numerics(), compile=False)
