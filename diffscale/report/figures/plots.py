"""Writes the figures as PNG and SVG; each caption says metric, n, sampler and what a band is."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from diffscale.report.analysis import Analysis
from diffscale.report.figures import style
from diffscale.report.figures.curves import against_compute, against_wall_clock, scaling_figure
from diffscale.report.figures.isoflop import isoflop_figure
from diffscale.report.figures.recipes import at_equal_compute, recipe_figure
from diffscale.report.figures.recommendation import recommendation_figures
from diffscale.report.figures.sweep import against_nfe, heat_map, nfe_families
from diffscale.report.stats.facets import is_distance
from diffscale.report.stats.frontier import fair, measured
from diffscale.report.stats.isoflop import LOSS_GROUP, ends_with_loss

MOST_FACETS = 12
"""Largest number of facets with figures, the main one first; tables and the page have all of them."""


def write_plots(analysis: Analysis, out: Path) -> list[Path]:
    """Write plots/<figure>-<facet>.png and .svg; names of the main facet's figures leave the facet out."""
    folder = out / "plots"
    folder.mkdir(parents=True, exist_ok=True)
    paths: list[Path] = []
    with style.style(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # names may be in any script; the font may not
        for name, figure in figures(analysis):
            for suffix in (".png", ".svg"):
                path = folder / (name + suffix)
                figure.savefig(path, metadata={"Date": None} if suffix == ".svg" else {"Software": "diffscale"})
                paths.append(path)
            plt.close(figure)
    return paths


def figures(analysis: Analysis) -> Iterator[tuple[str, Figure]]:
    """Yield (name, figure) for every figure that the records allow; call it within style.style()."""
    main, seen = True, dict[str, int]()
    for facet in islice(analysis.facets.to_dict("records"), MOST_FACETS):
        key, title = facet["facet"], facet["title"]
        points = measured(fair(analysis.points[analysis.points["facet"] == key]))
        curves = [c for c in analysis.curves if c.facet == key]
        sides = {str(model): at_equal_compute(part) for model, part in points.groupby("model")}
        at_equal = {model: last for model, last in sides.items() if last is not None}
        along = any(len(c.points) > 1 for c in curves)
        if not is_distance(facet["metric"]) or not (along or at_equal):
            continue
        suffix, main = ("" if main else f"-{key}"), False
        for model, last in at_equal.items():
            yield f"recipes-{_file(model)}{suffix}", recipe_figure(last, title)
        if not along:
            continue
        yield f"fid_vs_compute{suffix}", against_compute(points, curves, title)
        yield f"fid_vs_wall_clock{suffix}", against_wall_clock(points, curves, title)
        fits = {k: f for k, f in analysis.fits.items() if k[0] == key}
        if fits:
            crossings = analysis.scaling[(analysis.scaling["facet"] == key) & (analysis.scaling["kind"] == "crossing")]
            yield f"scaling{suffix}", scaling_figure(curves, fits, crossings, title)
        table = analysis.sweep[analysis.sweep["facet"] == key]
        for model, parts in table.groupby("model"):
            for number, (_, part) in enumerate(parts.groupby(["dataset", "family"], sort=True)):
                name = f"schedule_by_resolution-{_file(str(model))}{f'-{number + 1}' if number else ''}{suffix}"
                yield name, heat_map(part, facet["metric"], title)
    ends = ends_with_loss(analysis.rows)
    for group, law in analysis.isoflop_laws.items():
        own = ends[(ends[LOSS_GROUP] == list(group)).all(axis=1)]
        first = own.iloc[0]
        side = f"{first['train_resolution']}×{first['train_resolution']}"
        about = f"{first['dataset']} at {side}, {first['schedule']}, {first['prediction']} prediction"
        seen[group[0]] = seen.get(group[0], 0) + 1
        yield (
            f"isoflop-{_file(group[0])}{f'-{seen[group[0]]}' if seen[group[0]] > 1 else ''}",
            isoflop_figure(own, law, about),
        )
    for number, recommendation in enumerate(analysis.recommendations):
        for name, figure in recommendation_figures(recommendation):
            yield f"recommendation-{name}{f'-{number + 1}' if number else ''}", figure
    for number, (title, part) in enumerate(nfe_families(analysis.points)):
        yield f"fid_vs_nfe{f'-{number + 1}' if number else ''}", against_nfe(part, title)


def _file(name: str) -> str:
    return "".join(c if c.isalnum() or c in "._-" else "_" for c in name)[:60]
