"""`python -m diffscale.sample RUN | CHECKPOINT ... [eval.key=value ...]`: images from trained networks, over Ray.

Image i comes from seed i whatever the batch and the number of workers. Several runs give a sheet that compares them
at the same seeds.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from numpy.typing import NDArray
from rich.console import Console

from diffscale.config.factory import build_solver
from diffscale.core import storage
from diffscale.core.app import run_app
from diffscale.core.errors import UserError
from diffscale.diffusion import Evaluation, Guidance
from diffscale.distributed.connect import connect
from diffscale.evaluation import ModelSource, Sampling, pictures
from diffscale.evaluation.distribute import chunk_ranges, devices, kept_images, on_ray
from diffscale.evaluation.image_sources import class_counts, to_uint8
from diffscale.evaluation.sample_writer import Keeper
from diffscale.training.load import Trained, find_checkpoints, is_run, load_trained, settings_of_run

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
console = Console()
GRID = 64
STRIP_FRAMES = 10


@app.command()
def main(
    targets: Annotated[list[str], typer.Argument(metavar="RUN|CHECKPOINT... [EVAL.KEY=VALUE]...")],
    n: Annotated[int, typer.Option(help="images of each")] = 64,
    out: Annotated[str, typer.Option(help="folder for images and pictures")] = "samples",
    keep_format: Annotated[str, typer.Option("--format", help="png, arrow, or grid alone")] = "png",
    checkpoint: Annotated[str, typer.Option(help="last, all, or images seen")] = "last",
    ema: Annotated[str, typer.Option(help="weights: none, halflife, a power width; default eval.ema")] = "",
    solver: Annotated[str, typer.Option(help="heun,steps=18; default eval.solver")] = "",
    labels: Annotated[str, typer.Option(help="train, uniform, balanced, none, or a class")] = "balanced",
    precision: Annotated[str, typer.Option(help="fp32 or bf16")] = "fp32",
    guide: Annotated[str, typer.Option(help="checkpoint of a weaker network of the same process: autoguidance")] = "",
    trajectory: Annotated[int, typer.Option(help="strips of so many images from noise to image")] = 0,
    workers: Annotated[int, typer.Option(help="Ray actors; 0: one for each GPU, or else CPU, of the cluster")] = 0,
) -> None:
    """Draw images; with several runs, compare them at the same seeds."""
    overrides = [t for t in targets if re.match(r"^[A-Za-z_][\w.]*=", t)]
    runs = [t if storage.is_remote(t) else str(Path(t).resolve()) for t in targets if t not in overrides]
    for run in runs:
        if not is_run(run):
            raise UserError(setting="RUN", value=run, expected="a run's folder or a checkpoint of one")
    if n < 1 or not runs:
        raise UserError(setting="n", value=n, expected="at least 1, of at least one run")
    connect()
    rows: list[tuple[str, NDArray]] = []
    for run in runs:
        for uri in find_checkpoints(run, checkpoint):
            experiment = settings_of_run(uri, overrides, solver or None)
            trained = load_trained(uri, ema or experiment.eval.ema, experiment)
            sampling = sampling_of(trained, n, labels, precision, guide)
            folder = Path(out).resolve() / f"{experiment.name}-{trained.images_seen:09d}-{trained.ema}"
            first = draw(trained, sampling, n, folder, keep_format, workers)
            rows.append((trained.label, first))
            if trajectory:
                picture = strips(trained, replace(sampling, batch=trajectory))
                storage.write_bytes(f"{folder}-trajectory.png", picture)
            console.print(f"{trained.label}: {n} images in {folder}", soft_wrap=True)
    if len(rows) > 1:
        sheet = pictures.to_png(pictures.comparison([(name, images[:12]) for name, images in rows]))
        storage.write_bytes(str(Path(out).resolve() / "comparison.png"), sheet)
        console.print(f"same seeds side by side: {Path(out).resolve() / 'comparison.png'}", soft_wrap=True)


def sampling_of(trained: Trained, n: int, labels: str, precision: str, guide: str = "") -> Sampling:
    """The run's own sampler; guide: a checkpoint of a weaker network, for autoguidance."""
    s = trained.experiment.eval
    weaker = None
    if guide:
        settings = settings_of_run(guide)
        weaker = load_trained(guide, settings.eval.ema, settings).model
    guidance = Guidance(s.guidance_scale, s.guidance_interval, weaker)
    solver = build_solver(trained.experiment)
    return Sampling(solver, s.solver.name, s.seed, min(s.batch, n), guidance, labels, precision)


def source_of(trained: Trained, sampling: Sampling, n: int, device: str = "cpu") -> ModelSource:
    d = trained.dataset
    counts = class_counts(d) if getattr(trained.model, "num_classes", 0) else ()
    shape = (d.channels, d.resolution, d.resolution)
    return ModelSource(trained.model, trained.diffusion, sampling, shape, n, counts, device)


def draw(trained: Trained, sampling: Sampling, n: int, folder: Path, keep_format: str, workers: int = 0) -> NDArray:
    """Draws n images over Ray, keeps them in `folder`, a labelled grid of the first 64 beside it; returns those."""
    actors, device = devices(workers)
    source = source_of(trained, sampling, n, device)
    names = trained.dataset.class_names
    keep: Callable[[int, dict[str, Any]], None] | None = None
    keeper = None
    if keep_format != "grid":
        about = {"run_id": trained.columns["run_id"], "sampler": sampling.canonical(), "seed": sampling.seed}
        keeper = keep = Keeper(folder, keep_format, source.shape, names, about)
    ranges = chunk_ranges(n, sampling.batch)
    shown: dict[int, tuple[NDArray, NDArray]] = {}
    chunks = on_ray(
        source, [], ranges, workers=min(actors, len(ranges)), gpu=device == "cuda", keep_below=n if keep else GRID
    )
    for first, columns in chunks:
        if keep is not None:
            keep(first, columns)
        if first < GRID:
            shown[first] = kept_images(columns, source.shape)
    if keeper is not None:
        keeper.close()
    images = np.concatenate([shown[first][0] for first in sorted(shown)])[:GRID]
    drawn = np.concatenate([shown[first][1] for first in sorted(shown)])[:GRID]
    captions = [names[i] if source.class_counts and i < len(names) else "" for i in drawn]
    storage.write_bytes(f"{folder}-grid.png", pictures.to_png(pictures.grid(images, captions)))
    return images


def strips(trained: Trained, sampling: Sampling) -> bytes:
    """PNG: from noise to image, one row for each of the first `sampling.batch` samples, at most ten steps of it.

    What is shown is the noisy image as the network sees it, divided by its own standard deviation.
    """
    frames: list[tuple[float, torch.Tensor]] = []
    final, _ = source_of(trained, sampling, sampling.batch).draw(
        torch.arange(sampling.batch), lambda seen: frames.append((seen.logsnr, _visible(seen)))
    )
    chosen = np.unique(np.linspace(0, len(frames) - 1, STRIP_FRAMES).astype(int))
    stack = [to_uint8(frames[i][1]) for i in chosen] + [to_uint8(final)]
    captions = [f"logsnr {frames[i][0]:.1f}" for i in chosen] + ["image"]
    pixels = torch.stack(stack).permute(0, 1, 3, 4, 2).cpu().numpy()
    return pictures.to_png(pictures.strips(pixels, captions))


def _visible(seen: Evaluation) -> torch.Tensor:
    scale = seen.z.std(dim=(1, 2, 3), keepdim=True).clamp(min=1e-6)
    return torch.where(scale > 1, seen.z / scale, seen.z).float()


if __name__ == "__main__":
    run_app(app)
