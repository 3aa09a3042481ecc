"""From records to the report's folder: CSVs, plots, index.html. Recomputed from records alone, the same every time."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from diffscale.core.errors import UserError
from diffscale.records.store import Record, read_records
from diffscale.report.figures.plots import write_plots
from diffscale.report.page.page import render
from diffscale.report.page.samples import embed_grids, find_grids
from diffscale.report.stats import tables
from diffscale.report.stats.aggregate import aggregate
from diffscale.report.stats.facets import comparable, facet_table, to_rows
from diffscale.report.stats.findings import findings
from diffscale.report.stats.frontier import Curve, curves, pareto
from diffscale.report.stats.power_law import Fit
from diffscale.report.stats.scaling import scaling
from diffscale.report.stats.verdicts import verdicts


@dataclass(frozen=True)
class Analysis:
    """Everything that a report says, before it is drawn. Tables are keyed by `facet` (see facets.py)."""

    every: pd.DataFrame  # every evaluation
    rows: pd.DataFrame  # those of metrics in which something can be better
    facets: pd.DataFrame
    points: pd.DataFrame
    curves: list[Curve]
    pareto: pd.DataFrame
    scaling: pd.DataFrame
    fits: dict[tuple, Fit]
    verdicts: pd.DataFrame
    sweep: pd.DataFrame
    cost: pd.DataFrame
    findings: list[dict[str, str]]


def write_report(places: Iterable[str], out: Path, title: str = "diffscale") -> Analysis:
    """Reads every record under `places` (run folders, folders of runs, record files) and writes the report to `out`:
    the CSVs, plots/*.png and *.svg, index.html. Raises UserError where there is no record or one is damaged."""
    places = list(places)
    analysis = analyse(read_records(places))
    write_csvs(analysis, out)
    write_plots(analysis, out)
    grids = embed_grids(find_grids(places), _wanted_grids(analysis))
    (out / "index.html").write_text(render(analysis, grids, title), encoding="utf-8")
    return analysis


def _wanted_grids(analysis: Analysis) -> list[tuple[str, int]]:
    """Every (run, images_seen), the ends of the runs first, then the frontier, then the rest."""
    rows = analysis.rows.drop_duplicates(["run_id", "images_seen"])
    last = rows["images_seen"] == rows.groupby("run_id")["images_seen"].transform("max")
    best = set(zip(analysis.pareto["recipe"], analysis.pareto["images_seen"], strict=True))
    on = [key in best for key in zip(rows["recipe"], rows["images_seen"], strict=True)]
    ranked = rows.assign(_last=~last, _on=[not x for x in on]).sort_values(["_last", "_on", "run_id", "images_seen"])
    return [(str(run), int(images)) for run, images in zip(ranked["run_id"], ranked["images_seen"], strict=True)]


def analyse(records: Iterable[Record]) -> Analysis:
    """All tables of a report. Raises UserError where there is no record."""
    every = to_rows(records)
    rows = comparable(every)
    if rows.empty:
        raise UserError(
            setting="RUNS",
            value="no records",
            expected="run folders that hold records/*.json",
            fix="evaluate a run first: python -m diffscale.evaluate RUN",
        )
    points = aggregate(rows)
    all_curves = curves(points)
    table, fits = scaling(all_curves)
    facets, verdict_table, sweep = facet_table(rows), verdicts(all_curves), tables.sweep(points)
    return Analysis(
        every=every,
        rows=rows,
        facets=facets,
        points=points,
        curves=all_curves,
        pareto=pareto(points),
        scaling=table,
        fits=fits,
        verdicts=verdict_table,
        sweep=sweep,
        cost=tables.cost(points),
        findings=findings(facets, points, verdict_table, table, sweep),
    )


def write_csvs(analysis: Analysis, out: Path) -> list[Path]:
    """The tables as CSV files, joined by their column `facet`, which facets.csv describes."""
    without = ["settings", "runs"]
    files = {
        "fid_vs_compute": tables.every_evaluation(analysis.every),
        "facets": facet_table(analysis.every),
        "points": analysis.points.drop(columns=["settings"]),
        "pareto": _front(analysis.pareto.drop(columns=without), ["facet", "scope", "scope_value"]),
        "scaling": _described(analysis.scaling, analysis.facets),
        "verdicts": _described(analysis.verdicts, analysis.facets),
        "sweep": _described(analysis.sweep, analysis.facets),
        "cost": _described(analysis.cost, analysis.facets),
    }
    out.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, table in files.items():
        paths.append(out / f"{name}.csv")
        table.to_csv(paths[-1], index=False, float_format="%.10g", lineterminator="\n")
    return paths


def _described(table: pd.DataFrame, facets: pd.DataFrame) -> pd.DataFrame:
    """The table with what a reader must know of each row's facet beside it."""
    known = ["metric", "network", "eval_resolution", "n_generated", "n_reference", "solver", "nfe", "endpoint"]
    table = table.drop(columns=[c for c in known if c in table.columns])
    return _front(table.merge(facets[["facet", *known]], on="facet", how="left"), ["facet", *known])


def _front(table: pd.DataFrame, first: list[str]) -> pd.DataFrame:
    return table[first + [c for c in table.columns if c not in first]]
