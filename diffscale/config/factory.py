"""Builds the objects that the settings describe: dataset, model, diffusion, solver."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

from diffscale.core.errors import UserError
from diffscale.data import ShardCache, open_dataset, resolve
from diffscale.diffusion import SOLVERS, Diffusion, create_diffusion
from diffscale.models import create_model
from diffscale.models.layers import Backbone

if TYPE_CHECKING:
    from diffscale.config.experiment import Experiment
    from diffscale.data import Dataset


def open_training_data(experiment: Experiment) -> Dataset:
    """Open the dataset of `data.path` at `data.resolution`. builtin:emoji is built under the storage the first time."""
    data = experiment.data
    cache = ShardCache(data.cache, data.cache_gigabytes)
    return open_dataset(resolve(data.path, data.resolution, experiment.storage), cache=cache)


def build_model(experiment: Experiment, dataset: Dataset) -> nn.Module:
    """Build the backbone for this data. Raises UserError if it does not accept the resolution or a setting."""
    try:
        return model_for(experiment, dataset.resolution, dataset.channels, experiment.num_classes(dataset))
    except ValueError as error:
        raise _refused("model", experiment.model.name, error) from None


def model_for(experiment: Experiment, resolution: int, channels: int, num_classes: int) -> nn.Module:
    """Build the backbone for images of this shape. Raises ValueError if it does not accept the shape or a setting.

    A network that can carry state does not where no sample of the training is to see one.
    """
    settings = experiment.model
    model = create_model(
        settings.name, resolution=resolution, channels=channels, num_classes=num_classes, **settings.arguments()
    )
    if isinstance(model, Backbone):
        model.carries_state = model.carries_state and experiment.carries_state
    return model


def build_diffusion(experiment: Experiment, dataset: Dataset) -> Diffusion:
    """Build schedule, interpolant, prediction and weighting. Raises UserError for a singular combination."""
    d = experiment.diffusion
    try:
        return create_diffusion(
            schedule=d.schedule.model_dump(),
            interpolant=d.interpolant,
            prediction=d.prediction,
            weighting=d.weighting.model_dump(),
            input_scale=d.input_scale,
            sigma_data=d.sigma_data,
            input_range=d.input_range,
            input_std=d.input_std,
            multiscale_loss=d.multiscale_loss,
            resolution=dataset.resolution,
        )
    except ValueError as error:
        raise _refused("diffusion", f"{d.schedule.name} / {d.interpolant} / {d.prediction}", error) from None


def build_solver(experiment: Experiment) -> Any:
    """Build the sampler of `eval.solver`. Raises UserError for a setting that it does not accept."""
    settings = experiment.eval.solver
    try:
        return SOLVERS[settings.name](**settings.arguments())
    except ValueError as error:
        raise _refused("eval.solver", settings.name, error) from None


def _refused(setting: str, value: str, error: ValueError) -> UserError:
    return error if isinstance(error, UserError) else UserError(setting=setting, value=value, expected=str(error))
