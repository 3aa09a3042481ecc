"""How the same noise destroys small images more than large ones, and what makes up for it, on real images.

`python -m benchmarks.studies.noise_and_resolution` writes, under benchmarks/results/noise_and_resolution/:

    noise_and_resolution.csv, .png   measured logsnr of noisy images, by resolution, treatment and t
    logsnr_distribution.csv, .png    the logsnr that each schedule gives in training and on the sampling grids

Averaging an image down to a smaller side keeps its coarse signal and averages the noise away, so at one noise level a
large image keeps more of what is in it (Hoogeboom et al. 2023, section 3.1; Chen 2023, section 2).
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any

import matplotlib
import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
import typer
from matplotlib.lines import Line2D
from torch import Tensor

from diffscale.core.keyed_random import Stream, normal
from diffscale.core.storage import default_storage
from diffscale.data import open_dataset, resolve
from diffscale.diffusion import SCHEDULES, SOLVERS, Diffusion, create_diffusion, measured_logsnr
from diffscale.diffusion.interpolants import per_image
from diffscale.diffusion.solver_settings import Grid
from diffscale.report.figures.style import style

matplotlib.use("agg")
import matplotlib.pyplot as plt

RESULTS = Path(__file__).parents[1] / "results" / "noise_and_resolution"
SIDES = (8, 16, 32, 64)
COARSE = 8  # side at which what is left of an image is measured
TREATMENTS = {
    "plain": "the same noise",
    "shifted": "schedule shifted by 2 ln(8/side)",
    "input_scale": "input scale b = 8/side",
    "range_0_1": "inputs in [0, 1]",
}
SHOWN_T = 0.25
QUANTILES = (0.001, 0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99, 0.999)
GRIDS: tuple[Grid, ...] = ("uniform_t", "uniform_logsnr", "karras", "flow", "offset_cosine")
GRID_STEPS = 20


def treated(treatment: str, side: int) -> Diffusion:
    """The diffusion of one treatment at one side; at side 8 all but range_0_1 are the plain one."""
    shift = {"noise_resolution": COARSE} if treatment == "shifted" else {}
    return create_diffusion(
        schedule={"name": "simple_cosine", **shift},
        resolution=side,
        input_scale=COARSE / side if treatment == "input_scale" else 1.0,
        input_range="0,1" if treatment == "range_0_1" else "-1,1",
    )


def real_images(path: str, side: int, count: int, storage: str) -> Tensor:
    """(count, 3, side, side) float32 in [−1, 1], the same images at every side."""
    dataset = open_dataset(resolve(path, side, storage))
    indices = np.linspace(0, dataset.n - 1, min(count, dataset.n)).astype(np.int64)
    images, _ = dataset.gather(indices)
    return images.permute(0, 3, 1, 2).float() / 127.5 - 1


def corrupted(diffusion: Diffusion, images: Tensor, t: float) -> tuple[Tensor, float]:
    """(z, logsnr) of the images at t, with noise keyed by image."""
    logsnr = diffusion.schedule.logsnr(torch.full((len(images),), t))
    alpha, sigma = diffusion.alpha_sigma(logsnr)
    noise = normal(0, Stream.NOISE, torch.arange(len(images)), tuple(images.shape[1:]))
    x = diffusion.scale_images(images)
    return per_image(alpha, x) * x + per_image(sigma, x) * noise, float(logsnr[0])


def measure(images: dict[int, Tensor]) -> pd.DataFrame:
    """One row for each treatment, side and t: logsnr as the schedule says, and as measured at two sides."""
    rows = []
    for treatment in TREATMENTS:
        for side, clean in images.items():
            diffusion = treated(treatment, side)
            for t in np.linspace(0.1, 0.9, 17).round(3).tolist():
                z, logsnr = corrupted(diffusion, clean, t)
                coarse = [F.avg_pool2d(part, side // COARSE) for part in (z, clean)]
                rows.append(
                    {
                        "treatment": treatment,
                        "resolution": side,
                        "t": t,
                        "images": len(clean),
                        "logsnr_of_schedule": round(logsnr, 4),
                        "logsnr_measured": round(of_all(z, clean), 4),
                        "logsnr_measured_at_8px": round(of_all(*coarse), 4),
                    }
                )
    return pd.DataFrame(rows)


def of_all(z: Tensor, clean: Tensor) -> float:
    """Measured logsnr of all images taken as one: a single 8-px image is too small to measure it well."""
    return float(measured_logsnr(z.reshape(1, -1), clean.reshape(1, -1)))


def shown(diffusion: Diffusion, image: Tensor) -> np.ndarray:
    """(H, W, 3) in [0, 1]: the noisy image, with the signal at its own brightness."""
    z, logsnr = corrupted(diffusion, image[None], SHOWN_T)
    alpha = float(diffusion.alpha_sigma(torch.tensor(logsnr))[0])
    picture = diffusion.unscale_images(z / alpha)[0].permute(1, 2, 0)
    return ((picture + 1) / 2).clamp(0, 1).numpy()


@style()
def plot(table: pd.DataFrame, images: dict[int, Tensor], picture: int, path: Path) -> None:
    """Above: one image at t = 0.25 at every side. Below: what is left of the images at 8 pixels, against t."""
    figure = plt.figure(figsize=(15, 8), layout="constrained")
    halves: Any = figure.subfigures(2, 1, height_ratios=(1.25, 1.4))
    above, below = halves
    panels = below.subplots(1, len(TREATMENTS), sharey=True)
    groups = above.subfigures(1, len(TREATMENTS))
    colours = dict(zip(SIDES, plt.get_cmap("viridis")(np.linspace(0.85, 0.1, len(SIDES))), strict=True))
    for (treatment, title), group, panel in zip(TREATMENTS.items(), groups, panels, strict=True):
        for axis, side in zip(group.subplots(2, 2).flat, SIDES, strict=True):
            axis.imshow(shown(treated(treatment, side), images[side][picture]), interpolation="nearest")
            axis.set_title(f"{side} px", fontsize=9, color=colours[side])
            axis.axis("off")
        part = table[table.treatment == treatment]
        plain = table[table.treatment == "plain"]
        for side in SIDES:
            curve, reference = part[part.resolution == side], plain[plain.resolution == side]
            if treatment != "plain":
                panel.plot(reference.t, reference.logsnr_measured_at_8px, ":", color=colours[side], linewidth=1)
            panel.plot(curve.t, curve.logsnr_measured_at_8px, color=colours[side], label=f"{side} px", linewidth=2)
        panel.set(title=title, xlabel="t")
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("measured logsnr of the images averaged to 8 px")
    panels[0].legend()
    panels[1].legend(handles=[Line2D([], [], linestyle=":", color="grey", label="the same noise")], loc="lower left")
    above.suptitle(f"One picture with the noise of t = {SHOWN_T} (simple_cosine)")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def distributions() -> pd.DataFrame:
    """Long table: for each schedule, quantiles of logsnr in training, and the levels of each sampling grid."""
    rows = []
    for name, build in SCHEDULES.items():
        schedule = build()
        levels = schedule.logsnr(1 - torch.tensor(QUANTILES, dtype=torch.float64)).tolist()
        for quantile, level in zip(QUANTILES, levels, strict=True):
            rows.append({"schedule": name, "kind": "training", "place": quantile, "logsnr": level})
        for grid in GRIDS:
            levels = SOLVERS["ddim"](steps=GRID_STEPS, grid=grid).logsnr_grid(schedule)
            rows += [{"schedule": name, "kind": grid, "place": i, "logsnr": x} for i, x in enumerate(levels)]
    return pd.DataFrame(rows).round({"logsnr": 4})


@style()
def plot_distributions(table: pd.DataFrame, path: Path) -> None:
    """For each schedule: the density of logsnr in training, and under it the levels of each grid."""
    figure, axes = plt.subplots(5, 2, figsize=(12, 14), sharex=True, layout="constrained")
    colours = plt.get_cmap("tab10")(range(len(GRIDS)))
    t = torch.linspace(0, 1, 200_002, dtype=torch.float64)[1:-1]
    for axis, (name, build) in zip(axes.flat, SCHEDULES.items(), strict=True):
        density, edges = np.histogram(build().logsnr(t).numpy(), bins=160, range=(-20, 20), density=True)
        axis.fill_between((edges[1:] + edges[:-1]) / 2, density, color="0.75", label="training")
        top = density.max()
        for i, (grid, colour) in enumerate(zip(GRIDS, colours, strict=True)):
            levels = table[(table.schedule == name) & (table.kind == grid)].logsnr
            axis.plot(levels, np.full(len(levels), -top * 0.09 * (i + 1)), "|", color=colour, label=grid, markersize=8)
        axis.set(title=name, yticks=[], xlim=(-21, 21))
        axis.grid(alpha=0.3, axis="x")
    axes.flat[0].legend(fontsize=8, loc="upper left")
    for axis in axes[-1]:
        axis.set_xlabel(f"logsnr (noise on the left); ticks: the {GRID_STEPS} levels of each sampling grid")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(
    data: Annotated[str, typer.Option(help="dataset; with other images, built at 8, 16, 32 and 64")] = "builtin:emoji",
    images: Annotated[int, typer.Option(help="images measured")] = 256,
    picture: Annotated[int, typer.Option(help="which of them is shown")] = 40,
    storage: Annotated[str, typer.Option(help="where the embedded images are built")] = "",
    out: Annotated[Path, typer.Option(help="folder of the CSVs and plots")] = RESULTS,
) -> None:
    """Measure, write the CSVs and plots, and say the result in four lines."""
    out.mkdir(parents=True, exist_ok=True)
    by_side = {side: real_images(data, side, images, storage or default_storage()) for side in SIDES}
    table = measure(by_side)
    table.to_csv(out / "noise_and_resolution.csv", index=False)
    plot(table, by_side, picture, out / "noise_and_resolution.png")
    levels = distributions()
    levels.to_csv(out / "logsnr_distribution.csv", index=False)
    plot_distributions(levels, out / "logsnr_distribution.png")
    middle = table[table.t == 0.5].set_index(["treatment", "resolution"])["logsnr_measured_at_8px"].to_dict()
    for treatment, title in TREATMENTS.items():
        gaps = [(side, middle[treatment, side] - middle["plain", COARSE]) for side in SIDES]
        typer.echo(f"{title}: " + ", ".join(f"{side} px {gap:+.2f}" for side, gap in gaps))
    typer.echo(f"(logsnr at 8 px and t = 0.5, against 8-px images; 2 ln 2 = {2 * math.log(2):.2f}) → {out}")


if __name__ == "__main__":
    typer.run(main)
