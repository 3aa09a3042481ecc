"""Writes the figures as PNG and SVG; each caption says metric, n, sampler and what a band is."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure

from diffscale.report.analysis import Analysis
from diffscale.report.figures import style
from diffscale.report.figures.curves import against_compute, against_wall_clock, scaling_figure
from diffscale.report.figures.isoflop import fitted_laws, isoflop_figure
from diffscale.report.figures.recipes import at_equal_compute, recipe_figure
from diffscale.report.figures.recommendation import recommendation_figures
from diffscale.report.figures.sweep import against_nfe, heat_map, nfe_families
from diffscale.report.stats.facets import is_distance
from diffscale.report.stats.frontier import Curve, fair, measured

MOST_FACETS = 12
"""Largest number of facets with figures, the main one first; tables and the page have all of them."""
MOST_FIGURES = 12
"""Largest number of figures: each takes half a second, and a thousand runs have hundreds of schedules to compare."""
SAVED: dict[str, dict[str, Any]] = {
    ".png": {"metadata": {"Software": "diffscale"}, "pil_kwargs": {"compress_level": 2}},  # a third faster, 11 % larger
    ".svg": {"metadata": {"Date": None}},
}
Figures = Iterator[tuple[str, Figure]]


def write_plots(analysis: Analysis, out: Path) -> list[Path]:
    """Write plots/<figure>-<facet>.png and .svg; names of the main facet's figures leave the facet out."""
    folder = out / "plots"
    folder.mkdir(parents=True, exist_ok=True)
    paths: list[Path] = []
    with style.style(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # names may be in any script; the font may not
        for name, figure in figures(analysis):
            for suffix, options in SAVED.items():
                path = folder / (name + suffix)
                figure.savefig(path, **options)
                paths.append(path)
            plt.close(figure)
    return paths


def figures(analysis: Analysis) -> Figures:
    """Yield (name, figure) for the figures that the records allow, at most MOST_FIGURES, the most important first.

    Call it within style.style().
    """
    every = (_recommendations, _against_cost, _isoflops, _against_nfe, _recipes, _schedules)
    return islice(chain.from_iterable(kind(analysis) for kind in every), MOST_FIGURES)


def _recommendations(analysis: Analysis) -> Figures:
    for number, recommendation in enumerate(analysis.recommendations):
        for name, figure in recommendation_figures(recommendation):
            yield f"recommendation-{name}{f'-{number + 1}' if number else ''}", figure


def _drawn_facets(analysis: Analysis) -> Iterator[tuple[dict, str, list[Curve], dict[str, pd.DataFrame]]]:
    """Yield each facet with figures, the suffix of their names, its curves, and its recipes of equal compute by model.

    Names of the main facet's figures have no suffix.
    """
    main = True
    for facet in islice(analysis.facets.to_dict("records"), MOST_FACETS):
        points = measured(fair(analysis.points[analysis.points["facet"] == facet["facet"]]))
        curves = [c for c in analysis.curves if c.facet == facet["facet"]]
        if not any(len(c.points) > 1 for c in curves):
            curves = []
        sides = {str(model): at_equal_compute(part) for model, part in points.groupby("model")}
        at_equal = {model: last for model, last in sides.items() if last is not None}
        if is_distance(facet["metric"]) and (curves or at_equal):
            yield {str(k): v for k, v in facet.items()}, "" if main else f"-{facet['facet']}", curves, at_equal
            main = False


def _against_cost(analysis: Analysis) -> Figures:
    for facet, suffix, curves, _ in _drawn_facets(analysis):
        if not curves:
            continue
        key, title = facet["facet"], facet["title"]
        points = measured(fair(analysis.points[analysis.points["facet"] == key]))
        yield f"fid_vs_compute{suffix}", against_compute(points, curves, title)
        yield f"fid_vs_wall_clock{suffix}", against_wall_clock(points, curves, title)
        fits = {k: f for k, f in analysis.fits.items() if k[0] == key}
        if fits:
            crossings = analysis.scaling[(analysis.scaling["facet"] == key) & (analysis.scaling["kind"] == "crossing")]
            yield f"scaling{suffix}", scaling_figure(curves, fits, crossings, title)


def _isoflops(analysis: Analysis) -> Figures:
    seen = dict[str, int]()
    for about, ends, law in fitted_laws(analysis):
        model = str(ends["model"].iloc[0])
        seen[model] = seen.get(model, 0) + 1
        number = f"-{seen[model]}" if seen[model] > 1 else ""
        yield f"isoflop-{_file(model)}{number}", isoflop_figure(ends, law, about)


def _against_nfe(analysis: Analysis) -> Figures:
    for number, (title, part) in enumerate(nfe_families(analysis.points)):
        yield f"fid_vs_nfe{f'-{number + 1}' if number else ''}", against_nfe(part, title)


def _recipes(analysis: Analysis) -> Figures:
    for facet, suffix, _, at_equal in _drawn_facets(analysis):
        for model, last in at_equal.items():
            yield f"recipes-{_file(model)}{suffix}", recipe_figure(last, facet["title"])


def _schedules(analysis: Analysis) -> Figures:
    for facet, suffix, curves, _ in _drawn_facets(analysis):
        if not curves:
            continue
        table = analysis.sweep[analysis.sweep["facet"] == facet["facet"]]
        for model, parts in table.groupby("model"):
            for number, (_, part) in enumerate(parts.groupby(["dataset", "family"], sort=True)):
                name = f"schedule_by_resolution-{_file(str(model))}{f'-{number + 1}' if number else ''}{suffix}"
                yield name, heat_map(part, facet["metric"], facet["title"])


def _file(name: str) -> str:
    return "".join(c if c.isalnum() or c in "._-" else "_" for c in name)[:60]
