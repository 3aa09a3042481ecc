"""Validation loss against size, one parabola for each budget, and its minima."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from diffscale.report.figures import style
from diffscale.report.stats.findings import flops
from diffscale.report.stats.isoflop import IsoFlop, budgets_of


def isoflop_figure(ends: pd.DataFrame, law: IsoFlop, about: str) -> Figure:
    """Draw the ends of one backbone's runs with the fitted law.

    ends: of one LOSS_GROUP
    about: what the runs have in common, for the caption
    """
    figure, axes = plt.subplots(figsize=(style.WIDTH, style.HEIGHT))
    model = str(ends["model"].iloc[0])
    look = style.looks([model])[model]
    numbers = budgets_of(ends["train_flops"].to_numpy(float))
    grid = np.geomspace(ends["parameters"].min() / 1.5, ends["parameters"].max() * 1.5, 80)
    tags: list[style.End] = []
    lowest = float(ends["val_loss"].min())
    for number in range(numbers.max() + 1):
        own = ends[numbers == number].sort_values("parameters")
        compute = float(np.exp(np.log(own["train_flops"]).mean()))
        strength = 0.35 + 0.65 * (number + 1) / (numbers.max() + 1)
        axes.plot(grid, law.at(grid, compute), color=look.color, alpha=strength, lw=1)
        axes.plot(
            own["parameters"], own["val_loss"], look.marker, color=look.color, alpha=strength, mec="white", mew=0.6
        )
        best = float(law.size([compute])[0, 0])
        lowest = min(lowest, float(law.at(np.array([best]), compute)[0]))
        axes.plot(best, law.at(np.array([best]), compute), "o", mfc="none", mec=style.INK, ms=8)
        tags.append(style.End(grid[-1], float(law.at(grid[-1:], compute)[0]), f"{flops(compute)} FLOPs", look.color))
    axes.set_xscale("log")
    axes.set_yscale("log")
    style.log_axis(axes.xaxis, grid[0], grid[-1])
    low, high = 0.97 * lowest, 1.03 * float(ends["val_loss"].max())
    axes.set_ylim(low, high)
    style.log_axis(axes.yaxis, low, high)
    axes.set_xlabel("parameters")
    axes.set_ylabel("validation loss")
    exponents = law.exponents()["parameters"]
    text = (
        f"{about}. Runs of equal training FLOPs, one parabola for each budget; rings: the "
        f"best size, which grows with compute to the power {exponents[0]:.2f} [{exponents[1]:.2f}, {exponents[2]:.2f}]."
    )
    style.finish(axes, f"{model}: loss against size at equal compute", text, tags)
    return figure
