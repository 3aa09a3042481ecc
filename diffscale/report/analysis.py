"""The analysis of records: every table, fit and sentence of a report."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import pandas as pd

from diffscale.core.errors import UserError
from diffscale.records.recommendation import Recommendation
from diffscale.records.store import Record
from diffscale.report.stats import tables
from diffscale.report.stats.aggregate import aggregate
from diffscale.report.stats.facets import comparable, facet_table, to_rows
from diffscale.report.stats.findings import findings, of_guidance, of_losses, of_people
from diffscale.report.stats.frontier import Curve, curves, pareto
from diffscale.report.stats.isoflop import IsoFlop, isoflop
from diffscale.report.stats.power_law import Fit
from diffscale.report.stats.preference import agreement, with_metrics
from diffscale.report.stats.recommendations import of_recommendations
from diffscale.report.stats.scaling import scaling
from diffscale.report.stats.verdicts import verdicts


@dataclass(frozen=True)
class Analysis:
    """Everything that a report says, before it is drawn. Tables are keyed by `facet` (see stats/facets.py)."""

    every: pd.DataFrame  # every evaluation
    rows: pd.DataFrame  # evaluations by a metric in which one value can be better than another
    facets: pd.DataFrame  # one row per group of comparable values
    points: pd.DataFrame  # training seeds aggregated, with intervals
    curves: list[Curve]  # one backbone at one resolution
    pareto: pd.DataFrame  # the points that no cheaper point beats
    scaling: pd.DataFrame  # fitted power laws and their crossings
    fits: dict[tuple, Fit]  # by (facet, model, train_resolution, dataset_hash)
    verdicts: pd.DataFrame  # every pair of backbones
    sweep: pd.DataFrame  # schedule by resolution
    cost: pd.DataFrame  # what reaching a value cost
    isoflop: pd.DataFrame  # laws of validation loss over sizes and budgets
    isoflop_laws: dict[tuple, IsoFlop]  # by LOSS_GROUP
    recommendations: list[Recommendation]  # what was searched and promised
    preference: pd.DataFrame  # people's preference next to other metrics of the same checkpoints
    agreement: pd.DataFrame  # how well their orders agree
    findings: list[dict[str, str]]  # sentences: facet, kind, text


def analyse(
    records: Iterable[Record], recommendations: Sequence[Recommendation] = (), best_guidance: bool = False
) -> Analysis:
    """Compute all tables of a report. Raises UserError if there is no record.

    recommendations: their runs have laws of their own, without those that only tried a learning rate
    best_guidance: compare checkpoints each at its own best guidance, chosen on held-out images
    """
    every = to_rows(records, best_guidance)
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
    joined = with_metrics(rows)
    orders = agreement(joined)
    searched = [point for r in recommendations for part in r.searched for point in part.points]
    own = rows["run_name"].isin({point.run_name for point in searched})  # with those that tried a learning rate
    loss_laws, laws = isoflop(rows[~own & ~rows["run_id"].isin({point.run_id for point in searched})])
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
        isoflop=loss_laws,
        isoflop_laws=laws,
        recommendations=list(recommendations),
        preference=joined,
        agreement=orders,
        findings=of_recommendations(list(recommendations))
        + findings(facets, points, verdict_table, table, sweep)
        + of_guidance(rows)
        + of_losses(loss_laws, laws)
        + of_people(orders),
    )
