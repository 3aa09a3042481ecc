"""How much compute diffscale needs for what a peer reached: `peers.csv` of a suite, from its records alone."""

from __future__ import annotations

from collections.abc import Iterable

import pandas as pd

from benchmarks.suites.peers import RECIPES
from diffscale.records.schema import Record, higher_is_better
from diffscale.report.stats.aggregate import aggregate
from diffscale.report.stats.facets import comparable, groups, to_rows
from diffscale.report.stats.frontier import first_reach, is_on_frontier, measured

COLUMNS = [
    "metric",
    "n_generated",
    "n_reference",
    "nfe",
    "peer",
    "width",
    "peer_flops",
    "peer_value",
    "peer_low",
    "peer_high",
    "backbone",
    "flops_to_reach",
    "share_of_peer_flops",
    "value_at_end",
    "end_flops",
]


def against_peers(records: Iterable[Record]) -> pd.DataFrame:
    """Return one row for each comparability group, peer and backbone (CONTRIBUTING.md, decision 1).

    A row holds the training FLOPs at which the backbone first reached the final value of the peer's best width
    (interpolated in log-log), and their share of the peer's FLOPs. Empty cells were never reached. The kind of endpoint
    is not compared, because a peer's learning rate ends as its recipe says.
    """
    rows = comparable(to_rows(records))
    if rows.empty:
        return pd.DataFrame(columns=COLUMNS)
    rows = rows.assign(group=groups(rows))
    found = []
    for _, part in rows.groupby("group", sort=True):
        points = measured(aggregate(part))
        theirs, ours = points[points["model"].isin(RECIPES)], points[~points["model"].isin(RECIPES)]
        for peer, own in theirs.groupby("model", sort=True):
            best = own.sort_values("value", ascending=not higher_is_better(str(own["metric"].iloc[0]))).iloc[0]
            found += [_row(part.iloc[0], peer, best, name, curve) for name, curve in ours.groupby("model", sort=True)]
    return pd.DataFrame(found, columns=COLUMNS)


def _row(group: pd.Series, peer: object, best: pd.Series, backbone: object, curve: pd.DataFrame) -> dict[str, object]:
    curve = curve.sort_values("train_flops")
    higher = higher_is_better(str(group["metric"]))
    curve = curve[is_on_frontier(curve["train_flops"], curve["value"], higher)]
    reach = float(first_reach(curve, [float(best["value"])], ["train_flops"])[0, 0])
    last = curve.iloc[-1]
    shared = {name: group[name] for name in ("metric", "n_generated", "n_reference", "nfe")}
    return shared | {
        "peer": peer,
        "width": best["settings"]["peer.width"],
        "peer_flops": best["train_flops"],
        "peer_value": best["value"],
        "peer_low": best["value_low"],
        "peer_high": best["value_high"],
        "backbone": backbone,
        "flops_to_reach": reach,
        "share_of_peer_flops": reach / best["train_flops"],
        "value_at_end": last["value"],
        "end_flops": last["train_flops"],
    }
