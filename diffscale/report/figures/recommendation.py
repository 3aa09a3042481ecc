"""A recommendation's laws against compute: validation loss and distance, with the prediction and what came true."""

from __future__ import annotations

from collections.abc import Iterator

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from diffscale.records.recommendation import Prediction, Recommendation, Searched
from diffscale.report.figures import style
from diffscale.report.figures.isoflop import isoflop_figure
from diffscale.report.stats.predictions import distance_law, loss_law, points_of


def recommendation_figures(r: Recommendation) -> Iterator[tuple[str, Figure]]:
    """Yield (name, figure): loss and distance against compute, and the parabolas of each backbone."""
    yield "loss_vs_compute", _loss_figure(r)
    if r.recipe.distance is not None:
        yield "distance_vs_compute", _distance_figure(r)
    for part in r.searched:
        law = loss_law(part)
        if law is not None:
            ends = points_of(part).rename(columns={"flops": "train_flops"})
            about = f"{r.dataset} at {r.resolution}×{r.resolution}"
            yield f"isoflop-{part.backbone}", isoflop_figure(ends.assign(model=part.backbone), law, about)


def _loss_figure(r: Recommendation) -> Figure:
    figure, axes = plt.subplots(figsize=(style.WIDTH, style.HEIGHT))
    looks = style.looks([part.backbone for part in r.searched])
    grid = np.geomspace(r.budgets[0], 1.3 * r.recipe.flops, 80)
    tags = []
    for part in r.searched:
        look, law = looks[part.backbone], loss_law(part)
        best = _best(part, "val_loss")
        axes.plot(best["flops"], best["val_loss"], look.marker, color=look.color, mec="white", mew=0.6)
        if law is not None:
            value, low, high = law.loss(grid)
            axes.plot(grid, value, color=look.color)
            if part.backbone == r.recipe.backbone:
                axes.fill_between(grid, low, high, color=look.color, alpha=0.12, lw=0)
            tags.append(style.End(float(grid[-1]), float(value[-1]), part.backbone, look.color))
    _mark(axes, r, r.recipe.val_loss, None if r.outcome is None else r.outcome.val_loss)
    axes.set_ylabel("validation loss of the best size")
    text = (
        f"{r.dataset} at {r.resolution}×{r.resolution}. Best size at each budget, the fitted law and, for the "
        "recommended backbone, its 95 % interval. Bar: prediction for a new run; star: what came true."
    )
    style.finish(axes, "What more compute buys: validation loss", text, tags)
    return figure


def _distance_figure(r: Recommendation) -> Figure:
    assert r.recipe.distance is not None
    figure, axes = plt.subplots(figsize=(style.WIDTH, style.HEIGHT))
    looks = style.looks([part.backbone for part in r.searched])
    grid = np.geomspace(r.budgets[0], 1.3 * r.recipe.flops, 80)
    tags = []
    for part in r.searched:
        look, law = looks[part.backbone], distance_law(part)
        if law is None:
            continue
        axes.plot(law.compute, law.values, look.marker, color=look.color, mec="white", mew=0.6)
        values = law.fit.law(grid)[0]
        axes.plot(grid, values, color=look.color)
        tags.append(style.End(float(grid[-1]), float(values[-1]), part.backbone, look.color))
    _mark(axes, r, r.recipe.distance, None if r.outcome is None else r.outcome.distance)
    axes.set_ylabel(r.metric)
    text = (
        f"{r.dataset} at {r.resolution}×{r.resolution}. Distance of the size with the lowest loss at each budget. Bar: "
        "prediction for a new run with its 95 % interval; star: what came true."
    )
    style.finish(axes, "What more compute buys: distance", text, tags)
    return figure


def _best(part: Searched, column: str) -> pd.DataFrame:
    means = points_of(part).groupby(["budget", "rung"])[["flops", column]].mean().reset_index()
    return means.loc[means.groupby("budget")[column].idxmin()]


def _mark(axes: Axes, r: Recommendation, predicted: Prediction, measured: float | None) -> None:
    """Draw the prediction with its interval, and what came true."""
    ends = [[predicted.value - predicted.low], [predicted.high - predicted.value]]
    axes.errorbar([r.recipe.flops], [predicted.value], yerr=ends, fmt="_", color=style.INK, capsize=3, lw=1)
    if measured is not None and r.outcome is not None:
        axes.plot([r.outcome.flops], [measured], "*", color=style.INK, ms=9)
    axes.set_xscale("log")
    axes.set_yscale("log")
    style.log_axis(axes.xaxis, r.budgets[0], 1.3 * r.recipe.flops)
    style.log_axis(axes.yaxis, *axes.get_ylim())
    axes.set_xlabel("training FLOPs")
