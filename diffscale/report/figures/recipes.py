"""Recipes of one backbone at equal compute: the effect of an ablation or of a setting."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from diffscale.records.schema import higher_is_better
from diffscale.report.figures import style
from diffscale.report.figures.curves import bands
from diffscale.report.stats.facets import metric_name
from diffscale.report.stats.findings import flops, number

EQUAL = 1.1  # largest ratio of training FLOPs that counts as equal
MOST = 40  # recipes in a figure


def at_equal_compute(points: pd.DataFrame, fewest: int = 3) -> pd.DataFrame | None:
    """Return the last point of each recipe, best first; None if they are too few or did not train equally long."""
    last = points.sort_values("train_flops").groupby("recipe").tail(1)
    if len(last) < fewest or last["train_flops"].max() > EQUAL * last["train_flops"].min():
        return None
    return last.sort_values("value", ascending=not higher_is_better(last["metric"].iloc[0]))


def recipe_figure(last: pd.DataFrame, title: str) -> Figure:
    """Draw a dot with its interval for each recipe, of the best MOST. last: from `at_equal_compute`."""
    recipes, last = len(last), last.head(MOST)
    figure, axes = plt.subplots(figsize=(style.WIDTH, 1.3 + 0.27 * len(last)))
    model, places = last["model"].iloc[0], np.arange(len(last))
    look = style.looks([model])[model]
    values, names = last["value"].to_numpy(float), [str(label) for label in last["recipe_label"]]
    if last["value_low"].notna().any():
        axes.hlines(places, last["value_low"], last["value_high"], color=look.color, alpha=0.35, lw=4)
    axes.plot(values, places, ls="", color=look.color, marker=look.marker, mec="white", mew=0.6)
    for place, value in zip(places, values, strict=True):
        axes.annotate(number(value), (value, place), xytext=(0, 5), textcoords="offset points", ha="center", size=6.5)
    axes.set_yticks(places, [style.plain(name) for name in names])
    axes.invert_yaxis()
    axes.set_ylim(len(last) - 0.4, -0.7)
    axes.set_xlabel(style.plain(metric_name(last["metric"].iloc[0])))
    text = f"{title}; each after about {flops(last['train_flops'].median())} training FLOPs. {bands(last)}"
    if recipes > MOST:
        text += f" The best {MOST} of {recipes:,}."
    if (last["seeds"] == 1).any() and (last["seeds"] > 1).any():
        text += " A recipe of one seed takes the variance of those that were repeated."
    style.finish(axes, f"{model}: {metric_name(last['metric'].iloc[0])} of each recipe at equal compute", text)
    figure.subplots_adjust(left=min(0.5, 0.03 + 0.0105 * max(map(len, names))), right=0.97)
    return figure
