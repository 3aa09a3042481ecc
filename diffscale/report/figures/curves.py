"""Figures of values against the cost of training: FLOPs, wall-clock time, and the fitted power laws."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure

from diffscale.report.figures import style
from diffscale.report.figures.published import Published, matching
from diffscale.report.stats.facets import is_distance, metric_name
from diffscale.report.stats.frontier import Curve, on_frontier
from diffscale.report.stats.power_law import Fit
from diffscale.report.stats.scaling import BEYOND


def bands(points: pd.DataFrame) -> str:
    """Return the sentence of a caption that says what the bands are."""
    noise = set(points["noise"])
    seeds = sorted(set(points["seeds"]))
    count = f"{seeds[0]}" if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]}"
    if any(n.startswith("seeds") for n in noise):
        return f"Bands: 95 % interval of the mean over {count} training seeds, with the variance between seeds."
    if "evaluation" in noise:
        return "Bands: 95 % interval of the evaluation alone; no training seed was repeated."
    return "No intervals: nothing was repeated."


def set_limits(axes: Axes, x: np.ndarray, y: np.ndarray, metric: str) -> None:
    axes.set_xscale("log")
    axes.set_yscale("log" if is_distance(metric) else "linear")
    x, y = x[np.isfinite(x) & (x > 0)], y[np.isfinite(y)]
    axes.set_xlim(x.min() / 1.12, x.max() * 1.12)
    style.log_axis(axes.xaxis, x.min() / 1.12, x.max() * 1.12)
    if is_distance(metric):
        low, high = y.min() / 1.12, y.max() * 1.12
        axes.set_ylim(low, high)
        style.log_axis(axes.yaxis, low, high)


def _draw_curves(
    axes: Axes, points: pd.DataFrame, curves: list[Curve], column: str, factor: float = 1.0
) -> list[style.End]:
    """Draw all recipes faintly and each backbone's curve with markers and band; return the ends for the labels."""
    looks = style.looks(c.model for c in curves)
    sides = sorted({c.train_resolution for c in curves})
    for model, of_model in points.sort_values("train_flops").groupby("model"):
        lines = [own[[column, "value"]].to_numpy(float) * (factor, 1.0) for _, own in of_model.groupby("recipe")]
        axes.add_collection(LineCollection(lines, colors=looks[str(model)].color, linewidths=0.7, alpha=0.25))
    ends = []
    for curve in curves:
        look, own = looks[curve.model], curve.points
        x = own[column].to_numpy(float) * factor
        dashes = style.DASHES[sides.index(curve.train_resolution) % len(style.DASHES)]
        if own["value_low"].notna().any():
            axes.fill_between(x, own["value_low"], own["value_high"], color=look.color, alpha=0.16, lw=0)
        axes.plot(x, own["value"], color=look.color, marker=look.marker, ls=dashes, mec="white", mew=0.6, zorder=3)
        ends.append(style.End(x[-1], own["value"].iloc[-1], curve.name(len(sides) > 1), look.color))
    return ends


def figure_and_axes() -> tuple[Figure, Axes]:
    return plt.subplots(figsize=(style.WIDTH, style.HEIGHT))


def against_compute(points: pd.DataFrame, curves: list[Curve], title: str) -> Figure:
    """Draw values against training FLOPs with the frontier, and published systems of this dataset and resolution."""
    figure, axes = figure_and_axes()
    ends = _draw_curves(axes, points, curves, "train_flops")
    metric = str(points["metric"].iloc[0])
    set_limits(axes, points["train_flops"].to_numpy(), extent(points), metric)
    _ring_frontier(axes, points)
    published = {p for c in curves for p in matching(metric, str(c.points["dataset"].iloc[0]), c.train_resolution)}
    text = f"{title}. {bands(points)} Ringed: the frontier."
    if points["recipe"].nunique() > len(curves):
        text += " Thin lines: every recipe."
    if published:
        ends += _draw_published(axes, sorted(published, key=lambda p: p.fid))
        text += " Published systems: 50,000 samples, far more compute."
    axes.set_xlabel("training compute (FLOPs)")
    axes.set_ylabel(style.plain(metric_name(metric)))
    style.finish(axes, f"{metric_name(metric)} against training compute", text, ends)
    return figure


def extent(points: pd.DataFrame) -> np.ndarray:
    return np.concatenate([points[c].dropna().to_numpy(float) for c in ("value", "value_low", "value_high")])


def _ring_frontier(axes: Axes, points: pd.DataFrame) -> None:
    best = points[on_frontier(points)]
    axes.plot(best["train_flops"], best["value"], "o", mfc="none", mec=style.INK, mew=0.8, ms=9, zorder=4)


def _draw_published(axes: Axes, systems: list[Published]) -> list[style.End]:
    """Draw published systems as ticks on the right edge, or as points if their compute is known; return their labels.

    Systems below the axis are named in one line at its foot instead of stretching it.
    """
    low, right = axes.get_ylim()[0], axes.get_xlim()[1]
    ends = []
    for system in (s for s in systems if s.fid >= low):
        known = system.train_flops is not None and system.train_flops <= right
        x = system.train_flops if known and system.train_flops else right
        if known:
            axes.plot(x, system.fid, "x", color=style.FAINT, ms=4)
        else:
            axes.axhline(system.fid, xmin=0.985, color=style.FAINT, lw=1.2)
        ends.append(style.End(x, system.fid, f"{system.system} {system.fid:g}", style.GREY, 6.3))
    below = [f"{s.system} {s.fid:g}" for s in systems if s.fid < low]
    if below:
        text = "published, below this axis:  " + "  ·  ".join(below)
        axes.text(0.012, 0.015, text, transform=axes.transAxes, size=6.3, color=style.FAINT, va="bottom")
    return ends


def against_wall_clock(points: pd.DataFrame, curves: list[Curve], title: str) -> Figure:
    """Draw values against training time."""
    figure, axes = figure_and_axes()
    hours = points["device_seconds"] / points["devices"] / 3600
    unit, factor = ("hours", 1.0) if hours.max() >= 1 else ("minutes", 60.0)
    points = points.assign(wall=hours * factor)
    curves = [
        Curve(c.facet, c.model, c.train_resolution, c.dataset_hash, points.loc[c.points.index], c.recipes)
        for c in curves
    ]
    ends = _draw_curves(axes, points, curves, "wall")
    metric = str(points["metric"].iloc[0])
    set_limits(axes, points["wall"].to_numpy(), extent(points), metric)
    axes.set_xlabel(f"training wall-clock ({unit}, evaluation left out)")
    axes.set_ylabel(style.plain(metric_name(metric)))
    devices = sorted({f"{n} × {name}" for n, name in zip(points["devices"], points["device"], strict=True)})
    text = f"{title}. Trained on {'; '.join(devices[:4])}{' ...' if len(devices) > 4 else ''}. {bands(points)}"
    style.finish(axes, f"{metric_name(metric)} against wall-clock time", text, ends)
    return figure


def scaling_figure(curves: list[Curve], fits: dict[tuple, Fit], crossings: pd.DataFrame, title: str) -> Figure:
    """Draw points and fitted power laws with their bootstrap bands, up to ten times the largest compute."""
    figure, axes = figure_and_axes()
    looks = style.looks(c.model for c in curves)
    sides = sorted({c.train_resolution for c in curves})
    ends: list[style.End] = []
    y: list[float] = []
    for curve in curves:
        found = fits.get((curve.facet, curve.model, curve.train_resolution, curve.dataset_hash))
        if found is None:
            continue
        look = looks[curve.model]
        dashes = style.DASHES[sides.index(curve.train_resolution) % len(style.DASHES)]
        inside = np.geomspace(curve.compute[0], curve.compute[-1], 60)
        beyond = np.geomspace(curve.compute[-1], BEYOND * curve.compute[-1], 60)
        for grid, alpha, width in ((inside, 0.2, 1.6), (beyond, 0.1, 0.9)):
            low, high = found.interval(grid)
            axes.fill_between(grid, low, high, color=look.color, alpha=alpha, lw=0)
            axes.plot(grid, found.law(grid)[0], color=look.color, lw=width, ls=dashes)
        axes.plot(curve.compute, curve.values, look.marker, color=look.color, mec="white", mew=0.6, zorder=3)
        law = found.law
        end = float(law(beyond[-1:])[0, 0])
        floor = f"floor {law.floor[0]:.2g}" if law.floor[0] > 0.05 * curve.values.min() else "no floor"
        name = f"{curve.name(len(sides) > 1)}\nb = {law.exponent[0]:.2f}, {floor}"
        ends.append(style.End(beyond[-1], end, name, look.color, 7))
        y += [*curve.values, end]
    compute = np.concatenate([c.compute for c in curves])
    set_limits(axes, np.array([compute.min(), BEYOND * compute.max()]), np.array(y), "fid")
    for row in crossings.to_dict("records"):
        if row["crossing_probability"] >= 0.5:
            axes.axvline(row["crossing_flops"], color=style.FAINT, lw=0.7, ls=":", zorder=0)
            axes.annotate(
                style.plain(f"{row['model']} overtakes {row['overtakes']}"),
                (row["crossing_flops"], 0.985),
                xycoords=("data", "axes fraction"),
                rotation=90,
                size=6.5,
                color=style.GREY,
                va="top",
                ha="right",
            )
    metric = curves[0].metric
    axes.set_xlabel("training compute (FLOPs)")
    axes.set_ylabel(style.plain(metric_name(metric)))
    text = (
        f"{title}. Lines: floor + scale · C⁻ᵇ fitted to the logarithms, thin beyond the last evaluation. "
        "Bands: 95 % of a parametric bootstrap of the curve. Dotted: where one fit overtakes another."
    )
    style.finish(axes, f"How {metric_name(metric)} scales, and {BEYOND:g} × beyond", text, ends)
    return figure
