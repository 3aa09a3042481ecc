"""A recommendation's laws against compute: validation loss and distance, with the prediction and what came true."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from numpy.typing import NDArray

from diffscale.records.recommendation import Prediction, Recommendation
from diffscale.report.figures import style
from diffscale.report.figures.isoflop import isoflop_figure
from diffscale.report.stats.isoflop import IsoFlop
from diffscale.report.stats.predictions import distance_law, loss_law, points_of


@dataclass(frozen=True)
class Line:
    """A backbone's best values at each budget and the law through them.

    law: (3, n) on the figure's grid, the curve and its 95 % interval; None without a law
    """

    backbone: str
    compute: NDArray
    values: NDArray
    law: NDArray | None


def recommendation_figures(r: Recommendation) -> Iterator[tuple[str, Figure]]:
    """Yield (name, figure): loss and distance against compute, and the parabolas of each backbone."""
    grid, o = np.geomspace(r.budgets[0], 1.3 * r.recipe.flops, 80), r.outcome
    reached = (None, None) if o is None else (o.val_loss, o.distance)
    loss = "validation loss of the best size"
    yield "loss_vs_compute", _figure(r, grid, _losses(r, grid), loss, r.recipe.val_loss, reached[0])
    if r.recipe.distance is not None:
        distance = f"{r.metric} of the size with the lowest loss"
        yield (
            "distance_vs_compute",
            _figure(r, grid, _distances(r, grid), distance, r.recipe.distance, reached[1]),
        )
    for about, ends, law in searched_laws(r):
        yield f"isoflop-{ends['model'].iloc[0]}", isoflop_figure(ends, law, about)


def searched_laws(r: Recommendation) -> Iterator[tuple[str, pd.DataFrame, IsoFlop]]:
    """Yield the law of each searched backbone: what its runs have in common, the ends of these runs, and the law."""
    for part in r.searched:
        law = loss_law(part)
        if law is not None:
            ends = points_of(part).rename(columns={"flops": "train_flops"}).assign(model=part.backbone)
            yield f"{r.dataset} at {r.resolution}×{r.resolution}, the search of a recommendation", ends, law


def _losses(r: Recommendation, grid: NDArray) -> Iterator[Line]:
    for part in r.searched:
        means = points_of(part).groupby(["budget", "rung"])[["flops", "val_loss"]].mean().reset_index()
        best, law = means.loc[means.groupby("budget")["val_loss"].idxmin()], loss_law(part)
        compute, values = best["flops"].to_numpy(float), best["val_loss"].to_numpy(float)
        yield Line(part.backbone, compute, values, None if law is None else law.loss(grid))


def _distances(r: Recommendation, grid: NDArray) -> Iterator[Line]:
    for part in r.searched:
        law = distance_law(part)
        if law is not None:
            curve = np.stack([law.fit.law(grid)[0], *law.fit.interval(grid)])
            yield Line(part.backbone, law.compute, law.values, curve)


def _figure(
    r: Recommendation,
    grid: NDArray,
    lines: Iterable[Line],
    quantity: str,
    predicted: Prediction,
    measured: float | None,
) -> Figure:
    """Draw a quantity against compute, the prediction with its interval, and what training the recipe gave."""
    figure, axes = plt.subplots(figsize=(style.WIDTH, style.HEIGHT))
    looks, tags = style.looks([part.backbone for part in r.searched]), []
    for line in lines:
        look = looks[line.backbone]
        axes.plot(line.compute, line.values, look.marker, color=look.color, mec="white", mew=0.6)
        if line.law is not None:
            value, low, high = line.law
            axes.plot(grid, value, color=look.color)
            tags.append(style.End(float(grid[-1]), float(value[-1]), line.backbone, look.color))
            if line.backbone == r.recipe.backbone:
                axes.fill_between(grid, low, high, color=look.color, alpha=0.12, lw=0)
    ends = [[predicted.value - predicted.low], [predicted.high - predicted.value]]
    axes.errorbar([r.recipe.flops], [predicted.value], yerr=ends, fmt="_", color=style.INK, capsize=3, lw=1)
    if measured is not None and r.outcome is not None:
        axes.plot([r.outcome.flops], [measured], "*", color=style.INK, ms=9)
    axes.set_xscale("log")
    axes.set_yscale("log")
    style.log_axis(axes.xaxis, r.budgets[0], grid[-1])
    style.log_axis(axes.yaxis, *axes.get_ylim())
    axes.set_xlabel("training FLOPs")
    axes.set_ylabel(quantity)
    text = (
        f"{r.dataset} at {r.resolution}×{r.resolution}. The {quantity} at each budget, the fitted law and, for the "
        "recommended backbone, its 95 % interval. Bar: prediction for a new run with its 95 % interval; star: outcome."
    )
    style.finish(axes, f"What more compute buys: {quantity.partition(' of ')[0]}", text, tags)
    return figure
