"""Verdicts on pairs of backbones: one beats another only if intervals over training seeds do not touch."""

from __future__ import annotations

from itertools import combinations

import pandas as pd

from diffscale.records.schema import higher_is_better
from diffscale.report.stats.frontier import Curve, Reading, read_at

COLUMNS = [
    "facet",
    "model",
    "other",
    "train_resolution",
    "dataset_hash",
    "train_flops",
    "value",
    "value_low",
    "value_high",
    "other_value",
    "other_low",
    "other_high",
    "interpolated",
    "verdict",
]


def verdicts(all_curves: list[Curve]) -> pd.DataFrame:
    """Compare each pair of backbones (same facet, resolution and training set) at the largest compute of both.

    The first of a pair has the better value. verdict: `beats`; `not separated` (the 95 % intervals touch);
    `one seed each` (no variance between seeds is known, so nothing is claimed); `no common compute`.
    """
    rows = []
    for a, b in combinations(all_curves, 2):
        if (a.facet, a.dataset_hash, a.train_resolution) == (b.facet, b.dataset_hash, b.train_resolution):
            rows.append(_verdict(a, b))
    return pd.DataFrame(rows, columns=COLUMNS)


def _verdict(a: Curve, b: Curve) -> dict[str, object]:
    compute = min(a.compute[-1], b.compute[-1])
    first, second = read_at(a.points, compute), read_at(b.points, compute)
    shared = {"facet": a.facet, "train_resolution": a.train_resolution, "dataset_hash": a.dataset_hash}
    if first is None or second is None:
        return shared | {"model": a.model, "other": b.model, "verdict": "no common compute"}
    if (first.value > second.value) != higher_is_better(a.metric):
        (a, b), (first, second) = (b, a), (second, first)
    return shared | {
        "model": a.model,
        "other": b.model,
        "train_flops": compute,
        "value": first.value,
        "value_low": first.low,
        "value_high": first.high,
        "other_value": second.value,
        "other_low": second.low,
        "other_high": second.high,
        "interpolated": first.interpolated or second.interpolated,
        "verdict": decide(first, second, higher_is_better(a.metric)),
    }


def decide(better: Reading, worse: Reading, higher: bool) -> str:
    """Return `beats`, `not separated` or `one seed each`."""
    if not (better.known and worse.known):
        return "one seed each"
    apart = better.low > worse.high if higher else better.high < worse.low
    return "beats" if apart else "not separated"
