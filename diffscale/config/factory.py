"""Builds the objects that the settings describe: dataset, model, diffusion, solver."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

from diffscale.core.errors import SettingError, UserError
from diffscale.core.text import one_line
from diffscale.data import Choices, ShardCache, open_dataset, resolve
from diffscale.data.autoencoder import Autoencoder, Decoder
from diffscale.diffusion import SOLVERS, Diffusion, check_sampler, create_diffusion
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


def trained_images(experiment: Experiment, dataset: Dataset) -> Dataset:
    """Return the images of a dataset: itself, or the pixels that its latents were encoded from.

    Raises UserError where these are not next to the latents, or are others.
    """
    if (encoding := dataset.encoding) is None:
        return dataset
    try:
        images = open_dataset(data_place(experiment, encoding.image_resolution))
    except UserError as error:
        raise UserError(
            setting="data.path",
            value=experiment.data.path,
            expected=f"a folder with both the latents and the images of {encoding.image_resolution} pixels",
            reason=one_line(error.text(), 200),
            fix="name the folder that data build --encode wrote, not the one of the latents inside it",
        ) from None
    if images.content_hash != encoding.images:
        raise UserError(
            setting="data.path",
            value=images.path,
            expected=f"the images that the latents were encoded from (hash {encoding.images})",
            reason=f"these have the hash {images.content_hash}",
        )
    return images


def open_decoder(experiment: Experiment, dataset: Dataset) -> Decoder | None:
    """Return what decodes samples of latents: `data.decoder`, else the autoencoder that encoded the dataset.

    None for pixels, and for latents that came as arrays. Raises UserError for an autoencoder that cannot be read, does
    not fit the latents, or is another one than the dataset names.
    """
    given, encoding = experiment.data.decoder, dataset.encoding
    if encoding is None:
        if given is not None:
            reason = "nothing says how these latents are normalised" if dataset.is_latent else "these are pixels"
            raise UserError(
                setting="data.decoder",
                value=given,
                expected="null for this dataset",
                reason=reason,
                fix="data build SOURCE DATASET --encode VAE makes a dataset of latents that samples can be decoded of",
            )
        return None
    own = encoding.autoencoder + (f"@{encoding.revision}" if encoding.revision else "")
    autoencoder = Autoencoder.open(given or own, "data.decoder")
    made, needed = (autoencoder.latent_channels, autoencoder.factor), (dataset.channels, encoding.image_resolution)
    if (made[0], made[1] * dataset.resolution) != needed:
        raise UserError(
            setting="data.decoder",
            value=autoencoder.name,
            expected=f"an autoencoder of {dataset.channels} channels that makes {needed[1]} pixels of "
            f"{dataset.resolution} x {dataset.resolution} latents",
            reason=f"this one has {made[0]} channels and makes {made[1] * dataset.resolution} pixels",
        )
    if given is None and autoencoder.digest != encoding.digest:
        raise UserError(
            setting="data.decoder",
            value=autoencoder.name,
            expected=f"the autoencoder that encoded the dataset (hash {encoding.digest})",
            reason=f"what is there now has the hash {autoencoder.digest}",
            fix="restore it, or name this one on purpose: data.decoder=FOLDER",
        )
    shape = (dataset.channels, dataset.resolution, dataset.resolution)
    return Decoder(autoencoder, shape, tuple(encoding.shift), tuple(encoding.factors))


def build_model(experiment: Experiment, dataset: Dataset) -> nn.Module:
    """Build the backbone for this data.

    Raises UserError if it does not accept the resolution or a setting, or if its channels do not fit the data.
    """
    _check_channels(experiment, dataset)
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


def _check_channels(experiment: Experiment, dataset: Dataset) -> None:
    """Raise UserError for a network whose input or output training could not use."""
    model, learned = experiment.model, experiment.diffusion.variance == "learned_range"
    if image_channels := getattr(model, "image_channels", 0):
        raise UserError(
            setting="model.image_channels",
            value=image_channels,
            expected="0",
            reason="a network that is conditioned on an image, an upsampler, has no data to train on",
        )
    out, needed = getattr(model, "out_channels", 0) or dataset.channels, dataset.channels * (2 if learned else 1)
    if out == needed and (not learned or hasattr(model, "out_channels")):
        return
    if learned:
        fix = f"model.out_channels={needed} (unet and dit have it), or diffusion.variance=fixed"
    else:
        fix = "model.out_channels=0"
        if out == 2 * dataset.channels:
            fix += ", or for a learned variance diffusion.variance=learned_range diffusion.discrete=true"
    raise UserError(
        setting="model.out_channels",
        value=getattr(model, "out_channels", 0),
        expected=f"{needed} for images of {dataset.channels} channels" + (" and a learned variance" if learned else ""),
        reason=f"the network gives {out} channels",
        fix=fix,
    )


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
            discrete=d.discrete,
            variance=d.variance,
            vlb_weight=d.vlb_weight,
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


def check_sampling(experiment: Experiment, diffusion: Diffusion) -> None:
    """Raise UserError for a sampler that `eval.solver` describes and this process cannot have."""
    try:
        check_sampler(diffusion, build_solver(experiment))
    except ValueError as error:
        raise _refused("eval.solver", experiment.eval.solver.name, error) from None


def _refused(section: str, value: str, error: ValueError) -> UserError:
    """Return the error of a constructor with the dotted key of the setting, or of the section that it is about."""
    if isinstance(error, UserError):
        return error
    if isinstance(error, SettingError):
        return UserError(setting=f"{section}.{error.setting}", value=error.value, expected=error.expected)
    return UserError(setting=section, value=value, expected="settings that fit together", reason=str(error))
