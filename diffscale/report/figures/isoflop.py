"""Validation loss against size, one parabola for each budget, and its minima."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure

from diffscale.report.analysis import Analysis
from diffscale.report.figures import style
from diffscale.report.stats.findings import flops
from diffscale.report.stats.isoflop import LOSS_GROUP, IsoFlop, at_best_recipe, ends_with_loss, parabolas, sizes_around


def isoflop_figure(ends: pd.DataFrame, law: IsoFlop, about: str) -> Figure:
    """Draw the ends of one backbone's runs with the fitted law.

    ends: of one LOSS_GROUP
    about: what the runs have in common, for the caption
    """
    figure, axes = plt.subplots(figsize=(style.WIDTH, style.HEIGHT))
    model = str(ends["model"].iloc[0])
    look, grid, budgets = style.looks([model])[model], sizes_around(ends), parabolas(ends, law)
    tags: list[style.End] = []
    for number, budget in enumerate(budgets, 1):
        strength = 0.35 + 0.65 * number / len(budgets)
        curve = law.at(grid, budget.compute)
        axes.plot(grid, curve, color=look.color, alpha=strength, lw=1)
        marks: dict[str, Any] = {"color": look.color, "alpha": strength, "mec": "white", "mew": 0.6}
        axes.plot(budget.parameters, budget.losses, look.marker, **marks)
        axes.plot(*budget.best, "o", mfc="none", mec=style.INK, ms=8)
        tags.append(style.End(grid[-1], float(curve[-1]), f"{flops(budget.compute)} FLOPs", look.color))
    lowest = min(float(ends["val_loss"].min()), *(budget.best[1] for budget in budgets))
    axes.set_xscale("log")
    axes.set_yscale("log")
    style.log_axis(axes.xaxis, grid[0], grid[-1])
    low, high = 0.97 * lowest, 1.03 * float(ends["val_loss"].max())
    axes.set_ylim(low, high)
    style.log_axis(axes.yaxis, low, high)
    axes.set_xlabel("parameters")
    axes.set_ylabel("validation loss")
    text = isoflop_caption(law, about)
    style.finish(axes, f"{model}: loss against size at equal compute", text, tags)
    return figure


def isoflop_caption(law: IsoFlop, about: str) -> str:
    """Return the caption of a law's parabolas. about: what the runs have in common."""
    value, low, high = law.exponents()["parameters"]
    return (
        f"{about}. Runs of equal training FLOPs, one parabola for each budget; rings: the best size. By these runs "
        f"alone it grows with compute to the power {value:.2f} [{low:.2f}, {high:.2f}]."
    )


def fitted_laws(analysis: Analysis) -> Iterator[tuple[str, pd.DataFrame, IsoFlop]]:
    """Yield each law of validation loss: what its runs have in common, the ends of these runs, and the law."""
    ends = ends_with_loss(analysis.rows)
    for group, law in analysis.isoflop_laws.items():
        own = at_best_recipe(ends[(ends[LOSS_GROUP] == list(group)).all(axis=1)])
        first = own.iloc[0]
        side = f"{first['train_resolution']}×{first['train_resolution']}"
        yield f"{first['dataset']} at {side}, {first['schedule']}, {first['prediction']} prediction", own, law
