"""Draws images from trained networks over Ray: PNG files or Arrow datasets, grids, denoising strips."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diffscale.config.factory import build_solver, open_decoder
from diffscale.core import image_grids, storage
from diffscale.core.progress import working
from diffscale.distributed.connect import connect
from diffscale.evaluation import ModelSource, Sampling
from diffscale.evaluation.distribute import LABELS, chunk_ranges, devices, kept_images, run_on_ray
from diffscale.evaluation.sample_writer import SampleWriter
from diffscale.evaluation.sampling import sampling_of_settings, sampling_precision
from diffscale.evaluation.trajectories import trajectories
from diffscale.training.guide import load_guide, with_guide
from diffscale.training.load import TrainedModel, samples_source
from diffscale.training.settings_check import refuse_unfit_sampler

GRID = 64
COMPARED = 12


@dataclass(frozen=True)
class DrawOptions:
    """What to draw of each trained model and how to store it."""

    n: int = 64  # images
    keep_format: str = "png"  # png, arrow, npz, or grid for the grid alone
    labels: str = "balanced"  # train, uniform, balanced, none, or a class
    precision: str = ""  # fp32 or bf16; empty: as the run computes
    trajectory: int = 0  # samples in the picture of denoising strips
    workers: int = 0  # Ray actors; 0: one for each GPU, or else CPU, of the cluster


def draw_samples(trained: TrainedModel, folder: Path, options: DrawOptions) -> NDArray:
    """Draw images of a trained model into `folder`, with the pictures next to it.

    Image i comes from seed i whatever the batch and the number of workers. Returns the first 64 images, (n,H,W,C)
    uint8, that the grid shows.
    """
    refuse_unfit_sampler(trained.experiment, trained.dataset, trained.diffusion)
    connect()
    sampling = sampling_of(trained, options)
    first = _draw(trained, sampling, folder, options)
    if options.trajectory:
        source = _source(trained, sampling, options.trajectory)
        storage.write_bytes(f"{folder}-trajectory.png", trajectories(source, options.trajectory))
    return first


def comparison(rows: list[tuple[str, NDArray]]) -> bytes:
    """Return a PNG with one row of images for each named run, at the same seeds."""
    return image_grids.to_png(image_grids.comparison([(name, images[:COMPARED]) for name, images in rows]))


def sampling_of(trained: TrainedModel, options: DrawOptions) -> Sampling:
    """Return the run's own sampler with the options' labels and precision, and its guide loaded."""
    experiment = with_guide(trained.experiment)
    solver = build_solver(experiment)
    sampling = sampling_of_settings(experiment.eval, solver, options.n, carries_state=experiment.carries_state)
    guide = load_guide(experiment, trained.dataset)
    sampling = sampling if guide is None else guide.guiding(sampling)
    precision = options.precision or sampling_precision(trained.numerics.precision)
    return replace(sampling, labels=options.labels, precision=precision)


def _draw(trained: TrainedModel, sampling: Sampling, folder: Path, options: DrawOptions) -> NDArray:
    n = options.n
    actors, device = devices(options.workers)
    source = _source(trained, sampling, n, device)
    names = trained.dataset.class_names
    keep: Callable[[int, dict[str, Any]], None] | None = None
    writer = None
    if options.keep_format != "grid":
        about = samples_source(trained, sampling)
        writer = keep = SampleWriter(folder, options.keep_format, source.image_shape, names, about)
    ranges = chunk_ranges(n, sampling.batch)
    shown: dict[int, tuple[NDArray, NDArray]] = {}
    chunks = run_on_ray(
        source,
        [],
        ranges,
        workers=min(actors, len(ranges)),
        gpu=device == "cuda",
        keep_below=n if keep else GRID,
    )
    with working(f"samples of {trained.label}", n) as work:
        for first, columns in chunks:
            if keep is not None:
                keep(first, columns)
            if first < GRID:
                shown[first] = kept_images(columns, source.image_shape)
            work.advance(len(columns[LABELS]))
    if writer is not None:
        writer.close()
    images = np.concatenate([shown[first][0] for first in sorted(shown)])[:GRID]
    drawn = np.concatenate([shown[first][1] for first in sorted(shown)])[:GRID]
    captions = [names[i] if source.class_counts and i < len(names) else "" for i in drawn]
    storage.write_bytes(f"{folder}-grid.png", image_grids.to_png(image_grids.grid(images, captions)))
    return images


def _source(trained: TrainedModel, sampling: Sampling, n: int, device: str = "cpu") -> ModelSource:
    decoder = open_decoder(trained.experiment, trained.dataset)
    return ModelSource.of(trained.model, trained.diffusion, sampling, trained.dataset, n, device, decoder)
