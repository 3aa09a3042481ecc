"""Refuses settings that cannot train, before Ray starts: what only the data, the network or this machine can tell.

What follows from the settings alone is refused when they are loaded (config/experiment.py).
"""

from __future__ import annotations

import logging
import math
import os
from itertools import pairwise

import torch

from diffscale.config.experiment import Experiment
from diffscale.config.factory import (
    build_diffusion,
    build_model,
    build_solver,
    open_decoder,
    open_training_data,
    trained_images,
)
from diffscale.core.errors import UserError, require_package
from diffscale.core.places import require_working_places, require_writable
from diffscale.core.text import one_line
from diffscale.data import Dataset, create_loader, resolve, share_of_batch
from diffscale.diffusion import Diffusion, Guidance, training_loss
from diffscale.diffusion.sampling import check_sampler, guided_nfe
from diffscale.distributed.connect import gpus
from diffscale.evaluation.metrics.registry import check_counts, parse_metric
from diffscale.evaluation.networks.resize import RESIZES
from diffscale.evaluation.published import refuse_other_protocol, statistics_file
from diffscale.evaluation.sampling import check_sampling, sampling_of_settings
from diffscale.models.tokens import narrow_tokens
from diffscale.training.control import hang_seconds
from diffscale.training.ema import check_average
from diffscale.training.guide import check_guide, with_guide
from diffscale.training.numerics import refuse_missing_winograd, uses_gpu
from diffscale.training.optimizer import try_optimizer

log = logging.getLogger(__name__)

TRIED_IMAGES = 2


def check_settings(experiment: Experiment) -> Dataset:
    """Return the dataset of a run whose settings can train. Raises UserError for those that cannot.

    The network is built on the meta device, where it needs neither memory nor time, and two images pass through the
    loss: what does not fit together shows there.
    """
    require_writable(experiment.storage, "storage")
    require_working_places()
    hang_seconds()
    _refuse_missing_devices(experiment)
    _refuse_missing_trackers(experiment)
    dataset = open_training_data(experiment)
    if dataset.cache is not None:
        require_writable(str(dataset.cache.root), "data.cache" if experiment.data.cache else "DIFFSCALE_CACHE")
    _refuse_unfit_loader(experiment, dataset)
    try_optimizer(experiment.optim)
    diffusion = build_diffusion(experiment, dataset)
    refuse_unfit_sampler(experiment, dataset, diffusion)
    _refuse_unfit_evaluation(experiment, dataset)
    _try_on_meta(experiment, dataset, diffusion)
    _warn_of_narrow_tokens(experiment, dataset)
    return dataset


def _warn_of_narrow_tokens(experiment: Experiment, dataset: Dataset) -> None:
    narrow = narrow_tokens(experiment.model.model_dump(), dataset.channels)
    if narrow is not None and experiment.diffusion.prediction != "x0":
        log.warning(
            "the %d numbers of a patch pass through %d: diffusion.prediction=%s needs more of them than the patch has, "
            "or its loss stays high; smaller patches or wider tokens carry it, diffusion.prediction=x0 needs no width",
            *narrow,
            experiment.diffusion.prediction,
        )


def _refuse_missing_devices(experiment: Experiment) -> None:
    """Raise UserError for what this machine lacks, if it trains. Another cluster may yet grow."""
    train = experiment.train
    if os.environ.get("RAY_ADDRESS"):
        return
    if train.winograd is True and train.precision != "auto":
        refuse_missing_winograd(train.precision, torch.device("cuda" if uses_gpu(experiment) else "cpu"))
    found = len(gpus()) if train.gpu is True else 0
    if train.gpu is True and found < train.min_workers:
        raise UserError(
            setting="train.gpu",
            value=True,
            expected=f"{train.min_workers} GPUs, one for each worker; this machine has {found}",
            fix="train.gpu=auto, fewer workers, or RAY_ADDRESS of a cluster that has them",
        )


def _refuse_missing_trackers(experiment: Experiment) -> None:
    for name in experiment.train.trackers:
        require_package(name, setting="train.trackers", value=name)


def _refuse_unfit_loader(experiment: Experiment, dataset: Dataset) -> None:
    """Raise UserError where the loader cannot serve the dataset. Nothing is read."""
    data, train = experiment.data, experiment.train
    create_loader(
        data.loader,
        dataset,
        seed=train.seed,
        global_batch=train.global_batch,
        flip=data.flip,
        augment=data.augment,
        order=data.order,
        lanes=data.lanes,
        shard=share_of_batch(data.order, train.global_batch, 0, train.min_workers, data.lanes),
        verify=False,
    )


def refuse_unfit_sampler(experiment: Experiment, dataset: Dataset, diffusion: Diffusion) -> None:
    """Raise UserError for a sampler that has no way from noise to images on this schedule."""
    settings, solver = experiment.eval, build_solver(experiment)
    named = f"{settings.solver.name} with grid {solver.grid}"
    if settings.guidance_scale != 1 and settings.guide is None and not experiment.num_classes(dataset):
        raise UserError(
            setting="eval.guidance_scale", value=settings.guidance_scale, expected="1 for a dataset without classes"
        )
    if dataset.is_latent and solver.clip != "none":
        raise UserError(
            setting="eval.solver.clip",
            value=solver.clip,
            expected="none for a dataset of latents",
            reason="clipping limits the estimate to the range of pixels",
        )
    try:
        levels = solver.logsnr_grid(diffusion.schedule)
        rising = all(low < high for low, high in pairwise(levels)) and all(map(math.isfinite, levels))
        if rising:
            check_sampler(diffusion, solver)
            guided_nfe(diffusion, solver, Guidance(settings.guidance_scale, settings.guidance_interval))
    except (ValueError, ArithmeticError) as error:
        reason = one_line(error)
        raise UserError(setting="eval.solver", value=named, expected="another sampler", reason=reason) from None
    if not rising:
        raise UserError(
            setting="eval.solver",
            value=named,
            expected="noise levels that fall strictly within those of diffusion.schedule",
            reason=f"{solver.steps} steps give logsnr from {min(levels):.4g} to {max(levels):.4g}",
            fix="fewer steps, or sigma_min and sigma_max within the schedule",
        )


def _refuse_unfit_evaluation(experiment: Experiment, dataset: Dataset) -> None:
    experiment = with_guide(experiment)
    check_guide(experiment, dataset)
    settings = experiment.eval
    check_average(experiment)
    metrics = [parse_metric(name) for name in settings.metrics]
    check_counts(metrics, settings.n_generated, min(settings.n_reference or dataset.n, dataset.n))
    if settings.n_generated:
        classes = [1] * experiment.num_classes(dataset)
        check_sampling(sampling_of_settings(settings, build_solver(experiment), 1), classes)
    if settings.resize not in RESIZES:
        raise UserError(setting="eval.resize", value=settings.resize, expected=f"one of: {', '.join(RESIZES)}")
    if settings.n_generated and settings.eval_resolution not in (None, dataset.image_resolution):
        resolve(experiment.data.path, settings.eval_resolution, experiment.storage)
    if settings.n_generated:
        trained_images(experiment, dataset)
        open_decoder(experiment, dataset)
        if settings.reference is not None:
            side = settings.eval_resolution or dataset.image_resolution
            networks = {metric.name: metric.network for metric in metrics}
            refuse_other_protocol(statistics_file(settings.reference), side, settings.resize, networks)


def _try_on_meta(experiment: Experiment, dataset: Dataset, diffusion: Diffusion) -> None:
    """Build the network and pass two images through the loss, without memory for either."""
    device = torch.device("meta")
    with device:
        model = build_model(experiment, dataset)
    side, classes = dataset.resolution, experiment.num_classes(dataset)
    images = torch.empty(TRIED_IMAGES, dataset.channels, side, side, device=device)
    u = torch.empty(TRIED_IMAGES, device=device)
    label = torch.empty(TRIED_IMAGES, dtype=torch.int64, device=device) if classes else None
    try:
        training_loss(diffusion, model, images, u=u, noise=torch.empty_like(images), label=label)
    except (ValueError, RuntimeError) as error:
        raise UserError(
            setting="model",
            value=experiment.model.name,
            expected=f"a network for images of {side} pixels and {dataset.channels} channels",
            reason=one_line(error),
        ) from None
