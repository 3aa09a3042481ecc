"""Which settings mattered: the share of the metric's variance that each setting's value alone explains.

optuna.importance does not answer this question for a grid: its PED-ANOVA measures which settings separate the best
trials from the rest, its fANOVA fits a forest that is random and needs many trials, and neither gives an interval.
Omega squared of a grid of a dozen trials is a sum of squares, and its bootstrap says when a share means nothing.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

FEWEST_TRIALS = 8
FEWEST_PER_VALUE = 2


def importance(
    points: Sequence[dict[str, Any]], values: Sequence[float], draws: int = 500, seed: int = 0
) -> pd.DataFrame:
    """Return one row for each key that varies, with a bootstrap 95 % interval over the trials.

    `importance` is omega squared: eta squared of the main effect, less the share that random groups of the same
    number would explain. A setting without effect is near 0. Numbers with more than four values are cut into quartiles.
    A setting that follows from another one that is no number, as a warm-up from the network, has no row.
    It is NaN with fewer than FEWEST_TRIALS trials, or FEWEST_PER_VALUE for one value: their interval says nothing.

    points: settings of each finished trial
    values: metric of each trial; the logarithm is used if all are positive, since distances vary in ratios
    draws: bootstrap samples
    seed: of the bootstrap
    """
    y = np.asarray(values, float)
    if len(y) and (y > 0).all():
        y = np.log(y)
    keys = [k for k in dict.fromkeys(k for p in points for k in p) if len({json.dumps(p.get(k)) for p in points}) > 1]
    columns = {key: [p.get(key) for p in points] for key in keys}
    rng = np.random.default_rng(seed)
    rows = []
    for key, column in columns.items():
        if any(_follows(column, other) for other in columns.values() if other is not column):
            continue
        groups = _groups(column)
        enough = len(y) >= FEWEST_TRIALS and np.unique(groups, return_counts=True)[1].min() >= FEWEST_PER_VALUE
        samples = []
        for _ in range(draws if enough else 0):
            pick = rng.integers(len(y), size=len(y))
            if np.unique(groups[pick]).size > 1 and np.ptp(y[pick]) > 0:
                samples.append(_explained(groups[pick], y[pick]))
        low, high = np.percentile(samples, [2.5, 97.5]) if samples else (np.nan, np.nan)
        share = _explained(groups, y) if enough else np.nan
        rows.append({"setting": key, "importance": share, "low": low, "high": high, "trials": len(y)})
    table = pd.DataFrame(rows, columns=["setting", "importance", "low", "high", "trials"])
    return table.sort_values("importance", ascending=False, ignore_index=True)


def _follows(column: list[Any], other: list[Any]) -> bool:
    """Return whether each value of the other column, which has no numbers, comes with one value of this one alone."""
    if any(isinstance(value, (int, float)) for value in other):
        return False
    pairs = {(json.dumps(a, sort_keys=True), json.dumps(b, sort_keys=True)) for a, b in zip(other, column, strict=True)}
    own, others = ({pair[i] for pair in pairs} for i in (1, 0))
    return len(pairs) == len(others) and len(own) < len(others)


def _groups(column: list[Any]) -> np.ndarray:
    numbers = [v for v in column if isinstance(v, (int, float)) and not isinstance(v, bool)]
    if len(numbers) == len(column) and len(set(numbers)) > 4:
        edges = np.quantile(numbers, [0.25, 0.5, 0.75])
        return np.searchsorted(edges, np.asarray(numbers, float))
    return pd.factorize(pd.Series([json.dumps(v, sort_keys=True) for v in column]))[0]


def _explained(groups: np.ndarray, y: np.ndarray) -> float:
    """Return omega squared, in [0, 1]."""
    n, names = len(y), np.unique(groups)
    total = float(((y - y.mean()) ** 2).sum())
    if total == 0 or n <= len(names):
        return 0.0 if total == 0 else _eta(groups, y, total)
    between = _eta(groups, y, total) * total
    within = (total - between) / (n - len(names))
    return float(np.clip((between - (len(names) - 1) * within) / (total + within), 0.0, 1.0))


def _eta(groups: np.ndarray, y: np.ndarray, total: float) -> float:
    between = sum((groups == g).sum() * (y[groups == g].mean() - y.mean()) ** 2 for g in np.unique(groups))
    return float(between / total)
