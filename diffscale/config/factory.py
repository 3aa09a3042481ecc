"""Builds the objects that the settings describe: dataset, model, diffusion, solver."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

from diffscale.core.errors import SettingError, UserError
from diffscale.data import Choices, ShardCache, open_dataset, resolve
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
    return open_dataset(data_place(experiment, data.resolution), cache=cache)


def data_place(experiment: Experiment, resolution: int) -> str:
    """Return the place of `data.path` at a resolution, read as the other settings `data.*` say, for `open_dataset`."""
    data = experiment.data
    choices = Choices(data.config, data.image_column, data.label_column, channels=data.channels)
    return resolve(data.path, resolution, experiment.storage, choices)


def build_model(experiment: Experiment, dataset: Dataset) -> nn.Module:
    """Build the backbone for this data. Raises UserError if it does not accept the resolution or a setting."""
    own = getattr(experiment.model, "out_channels", 0)
    if own not in (0, dataset.channels):
        expected = f"0 or {dataset.channels}, the channels of the images"
        raise UserError(setting="model.out_channels", value=own, expected=expected)
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


def _refused(section: str, value: str, error: ValueError) -> UserError:
    """Return the error of a constructor with the dotted key of the setting, or of the section that it is about."""
    if isinstance(error, UserError):
        return error
    if isinstance(error, SettingError):
        return UserError(setting=f"{section}.{error.setting}", value=error.value, expected=error.expected)
    return UserError(setting=section, value=value, expected="settings that fit together", reason=str(error))
