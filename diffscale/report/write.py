"""Writes a report's folder from records: CSVs, plots, index.html. The same records give the same bytes."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from pathlib import Path

import pandas as pd

from diffscale.core.errors import UserError
from diffscale.core.progress import working
from diffscale.records.recommendation import read_recommendations
from diffscale.records.store import read_records
from diffscale.report.analysis import Analysis, analyse
from diffscale.report.figures.plots import write_plots
from diffscale.report.page.page import write_page
from diffscale.report.stats import tables
from diffscale.report.stats.facets import facet_table
from diffscale.report.stats.recommendations import fared


def write_report(places: Iterable[str], out: Path, title: str = "diffscale", best_guidance: bool = False) -> Analysis:
    """Read records and write a report: the CSVs, plots/*.png and *.svg, index.html.

    places: run folders, folders of runs, record files.
    out: the folder to write to; it is made.
    title: heading of index.html.
    best_guidance: compare checkpoints each at its own best guidance, chosen on held-out images
    Raises UserError if there is no record or one is damaged, or if `out` cannot be written.
    """
    places = list(places)
    with working("reading records", unit=""):
        records = read_records(places)
    with working(f"comparing {len(records):,} evaluations", unit=""):
        analysis = analyse(records, read_recommendations(places), best_guidance)
        write_csvs(analysis, make_writable(out))
    with working("drawing plots", unit=""):
        write_plots(analysis, out)
    with working("writing the page", unit=""):
        write_page(analysis, places, _wanted_grids(analysis), title, out)
    return analysis


def make_writable(out: Path) -> Path:
    """Make the folder of a report and return it. Raises UserError if it cannot be written."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        if not os.access(out, os.W_OK):
            raise PermissionError(13, "no permission to write there")
    except OSError as error:
        raise UserError(
            setting="--out", value=str(out), expected="a folder that can be written", reason=str(error.strerror)
        ) from None
    return out


def _wanted_grids(analysis: Analysis) -> list[tuple[str, int]]:
    """Return every (run, images_seen): the ends of the runs first, then the frontier, then the rest."""
    rows = analysis.rows.drop_duplicates(["run_id", "images_seen"])
    last = rows["images_seen"] == rows.groupby("run_id")["images_seen"].transform("max")
    best = set(zip(analysis.pareto["recipe"], analysis.pareto["images_seen"], strict=True))
    on = [key in best for key in zip(rows["recipe"], rows["images_seen"], strict=True)]
    ranked = rows.assign(_last=~last, _on=[not x for x in on]).sort_values(["_last", "_on", "run_id", "images_seen"])
    return [(str(run), int(images)) for run, images in zip(ranked["run_id"], ranked["images_seen"], strict=True)]


def write_csvs(analysis: Analysis, out: Path) -> list[Path]:
    """Write the tables as CSV files, joined by their column `facet`, which facets.csv describes."""
    without = ["settings", "sampler", "runs"]
    files = {
        "fid_vs_compute": tables.every_evaluation(analysis.every),
        "facets": facet_table(analysis.every),
        "points": analysis.points.drop(columns=["settings", "sampler"]),
        "pareto": _front(analysis.pareto.drop(columns=without), ["facet", "scope", "scope_value"]),
        "scaling": _described(analysis.scaling, analysis.facets),
        "verdicts": _described(analysis.verdicts, analysis.facets),
        "sweep": _described(analysis.sweep, analysis.facets),
        "cost": _described(analysis.cost, analysis.facets),
    }
    if len(analysis.isoflop):
        files |= {"isoflop": analysis.isoflop}
    if analysis.recommendations:
        files |= {"recommendation": fared(analysis.recommendations)}
    if len(analysis.preference):
        files |= {"preference": analysis.preference, "agreement": analysis.agreement}
    out.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, table in files.items():
        paths.append(out / f"{name}.csv")
        table.to_csv(paths[-1], index=False, float_format="%.10g", lineterminator="\n")
    return paths


def _described(table: pd.DataFrame, facets: pd.DataFrame) -> pd.DataFrame:
    """Add the columns that describe each row's facet."""
    known = ["metric", "network", "eval_resolution", "n_generated", "n_reference", "solver", "nfe", "endpoint"]
    table = table.drop(columns=[c for c in known if c in table.columns])
    return _front(table.merge(facets[["facet", *known]], on="facet", how="left"), ["facet", *known])


def _front(table: pd.DataFrame, first: list[str]) -> pd.DataFrame:
    return table[first + [c for c in table.columns if c not in first]]


def copy_pictures(folders: list[str], out: Path) -> list[Path]:
    """Copy the main plot and the newest sample grid of each run to the top of the report's folder; return the files."""
    plot = out / "fid_vs_compute.png"
    shutil.copyfile(out / "plots" / plot.name, plot)
    pictures = [plot]
    for folder in map(Path, folders):
        grids = sorted((folder / "samples").glob("*.png"))
        if grids:
            pictures.append(out / f"samples-{folder.name}.png")
            shutil.copyfile(grids[-1], pictures[-1])
    return pictures
