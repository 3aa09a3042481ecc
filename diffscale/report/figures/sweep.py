"""Figures across samplers and across schedules: value against NFE, and the schedule × resolution heat map."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from numpy.typing import NDArray

from diffscale.records.schema import higher_is_better
from diffscale.report.figures import style
from diffscale.report.figures.curves import bands, extent, figure_and_axes, set_limits
from diffscale.report.stats.facets import is_distance, metric_name
from diffscale.report.stats.findings import flops, number
from diffscale.report.stats.frontier import fair, measured

NO_COMMON_COMPUTE = "no common compute"


def nfe_families(points: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    """Return (title, points) of checkpoints that were sampled with several numbers of steps, all else being equal."""
    by = ["metric", "network", "reference", "resize", "eval_resolution", "n_generated", "n_reference"]
    by += ["guidance_scale", "endpoint", "dataset"]
    points = measured(fair(points))
    points = points.assign(_sampler=points["sampler"].map(_without_steps))
    families = []
    for _, part in points.groupby(by, sort=True):
        if not is_distance(part["metric"].iloc[0]):
            continue
        counts = part.groupby(["recipe", "images_seen", "_sampler"])["nfe"].transform("nunique")
        if (counts > 1).any():
            first = part.iloc[0]
            side = first["eval_resolution"]
            title = (
                f"{metric_name(first['metric'])} to {first['dataset']} at {side}×{side}, "
                f"n = {first['n_generated']:,} against {first['n_reference']:,}"
            )
            families.append((title, part[counts > 1]))
    return sorted(families, key=lambda family: -len(family[1]))[:4]


def nfe_lines(family: pd.DataFrame) -> list[pd.DataFrame]:
    """Return the points of each checkpoint and sampler of a family of `nfe_families`."""
    return [own for _, own in family.groupby(["recipe", "images_seen", "_sampler"], sort=True)]


@cache
def _without_steps(sampler: str) -> str:
    """Return a record's `sampler` without its number of steps, the one setting in which a family's points differ."""
    tree = json.loads(sampler)
    tree["solver"] = {k: v for k, v in tree.get("solver", {}).items() if k != "steps"}
    return json.dumps(tree, sort_keys=True)


def against_nfe(part: pd.DataFrame, title: str, most: int = 8) -> Figure:
    """Draw values against the number of network evaluations, one line per checkpoint and solver, at most `most`."""
    figure, axes = figure_and_axes()
    looks = style.looks(part["model"])
    solvers = sorted(set(part["solver"]))
    lines = sorted(nfe_lines(part), key=lambda own: -own["train_flops"].iloc[0])
    shown = pd.concat(lines[:most])
    ends: list[style.End] = []
    for own in lines[:most]:
        solver = own["solver"].iloc[0]
        own = own.sort_values("nfe")
        look = looks[own["model"].iloc[0]]
        dashes = style.DASHES[solvers.index(solver) % len(style.DASHES)]
        if own["value_low"].notna().any():
            axes.fill_between(own["nfe"], own["value_low"], own["value_high"], color=look.color, alpha=0.13, lw=0)
        axes.plot(own["nfe"], own["value"], color=look.color, marker=look.marker, ls=dashes, mec="white", mew=0.6)
        name = f"{own['model'].iloc[0]}, {solver}"
        ends.append(style.End(own["nfe"].iloc[-1], own["value"].iloc[-1], name, look.color))
    metric = str(part["metric"].iloc[0])
    set_limits(axes, shown["nfe"].to_numpy(float), extent(shown), metric)
    ticks = sorted(set(shown["nfe"]))
    if len(ticks) <= 10:
        axes.set_xticks(ticks, [str(t) for t in ticks])
        axes.minorticks_off()
    axes.set_xlabel("sampling cost (network evaluations per image)")
    axes.set_ylabel(style.plain(metric_name(metric)))
    more = f" The {most} most trained of {len(lines)} lines." if len(lines) > most else ""
    text = f"{title}. One checkpoint for each line, sampled with more and more steps.{more} {bands(shown)}"
    if len(solvers) > 1:
        text += f" Solid, then ever more broken: {', '.join(style.plain(s) for s in solvers)}."
    style.finish(axes, f"{metric_name(metric)} against sampling cost", text, ends)
    return figure


def shades(grid: pd.DataFrame, higher: bool = False) -> NDArray:
    """Return how much worse than the best of its column a cell is, from 0 to 1: full colour is a factor of 1.5 or more.

    A scale that ended at the worst cell painted a difference of 3 %, which no interval separated, as dark as any.

    higher: whether more is better. Values that are not all positive are compared by differences.
    """
    positive = bool((grid.to_numpy(float)[~grid.isna()] > 0).all())
    logs = np.log(grid) if positive else grid
    worse = (logs.max() - logs if higher else logs - logs.min()).to_numpy(float)
    return worse / max(float(np.nanmax(worse, initial=0.0)), np.log(1.5) if positive else 1e-6)


def heat_map(part: pd.DataFrame, metric: str, title: str) -> Figure:
    """Draw schedule × resolution at equal compute. A cell that starts above it says so and has no colour.

    part: one family of `tables.sweep`
    """
    grid = part.pivot(index="schedule", columns="train_resolution", values="value")
    higher = higher_is_better(metric)
    grid = grid.loc[grid.mean(axis=1).sort_values(ascending=not higher).index]
    cells = part.set_index(["schedule", "train_resolution"])
    rows, columns = grid.shape
    longest = max(len(str(name)) for name in grid.index)
    figure, axes = plt.subplots(figsize=(style.WIDTH, 1.75 + 0.5 * rows))
    scaled = shades(grid, higher)
    axes.imshow(scaled, cmap="Blues", vmin=0, vmax=1.5, aspect="auto")
    for i, schedule in enumerate(grid.index):
        for j, side in enumerate(grid.columns):
            if not np.isfinite(scaled[i, j]):
                text = NO_COMMON_COMPUTE if (schedule, side) in cells.index else "not run"
                axes.text(j, i, text, ha="center", va="center", size=7, color=style.FAINT)
                continue
            cell = cells.loc[(schedule, side)]
            dark = scaled[i, j] > 0.8
            best = bool(scaled[i, j] == 0)
            ink: dict[str, Any] = {"ha": "center", "color": "white" if dark else style.INK}
            axes.text(j, i, number(cell["value"]), va="bottom", size=8, weight="bold" if best else "normal", **ink)
            if np.isfinite(cell["value_low"]):
                interval = f"[{number(cell['value_low'])}, {number(cell['value_high'])}]"
                axes.text(j, i, interval, va="top", size=6.5, **ink)
    axes.set_xticks(range(columns), [f"{side} px" for side in grid.columns])
    axes.set_yticks(range(rows), [style.plain(str(name)) for name in grid.index])
    axes.set_xlabel("training resolution")
    axes.grid(False)
    axes.tick_params(which="both", length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.set_xticks(np.arange(-0.5, columns), minor=True)
    axes.set_yticks(np.arange(-0.5, rows), minor=True)
    axes.grid(which="minor", color="white", linewidth=2)
    only = f", {part['family_label'].iloc[0]}" if part["family_label"].iloc[0] else ""
    text = (
        f"{title}{only}; all at {flops(part['train_flops'].iloc[0])} training FLOPs, all other settings equal. "
        "Colour: ratio to the best of its column (bold), white is best. Brackets: 95 % intervals."
    )
    style.finish(axes, f"Schedule × resolution, {part['model'].iloc[0]}: {metric_name(metric)}", text)
    figure.subplots_adjust(left=min(0.5, 0.03 + 0.0135 * longest), right=0.98)
    return figure
