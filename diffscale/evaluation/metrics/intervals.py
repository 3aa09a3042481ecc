"""Uncertainty of a Fréchet distance: a jackknife interval, and the value for infinitely many samples."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from diffscale.evaluation.feature_store import select_rows
from diffscale.evaluation.metrics.distances import Root, frechet, frechet_of_features
from diffscale.evaluation.metrics.statistics import moments_of

GROUPS = 16


def frechet_interval(features: NDArray, reference: Root, groups: int = GROUPS) -> tuple[float, float, float]:
    """Return the distance of features (n,d) to the reference and its 95 % interval: (value, low, high).

    A delete-one-group jackknife (Shao and Wu 1989) over `groups` strided groups, with Student's t. The groups are of
    one size (the last n mod groups samples are never left out): the bias depends on n. The interval covers the
    expected distance at this n: what other seeds of the same generator would give on average. The bias of a finite
    n is not part of it (every value of a comparison shares it; see `frechet_at_infinity`). A naive bootstrap would be
    biased up, since resampled sets have fewer distinct samples. Fewer than 2·groups samples: the ends are NaN.
    """
    n, dim = features.shape
    size = n // groups
    rows = [np.arange(g, size * groups, groups) for g in range(groups)]
    if n > dim:
        total = moments_of(features)
        value = frechet(total, reference)
        if n < 2 * groups:
            return value, float("nan"), float("nan")
        left_out = [frechet(total.without(moments_of(select_rows(features, r))), reference) for r in rows]
    else:
        x = np.asarray(features[:], np.float64)
        value = frechet_of_features(x, reference)
        if n < 2 * groups:
            return value, float("nan"), float("nan")
        left_out = [frechet_of_features(np.delete(x, r, axis=0), reference) for r in rows]
    error = np.sqrt((groups - 1) * np.var(left_out))
    from scipy import stats  # import cost

    reach = float(stats.t.ppf(0.975, groups - 1) * error)
    return value, value - reach, value + reach


def frechet_at_infinity(
    features: NDArray, reference: Root, *, points: int = 15, fewest: int | None = None, seed: int = 2020
) -> tuple[float, float]:
    """Return (intercept, its standard error) of distance against 1/n, by least squares over random subsets.

    Chung and Forsyth 2020 (FID∞): the bias is linear in 1/n to first order. `points` sizes lie evenly between
    `fewest` (5000 as in the paper; n/10 below n = 10,000) and n. Raises ValueError for n < 2·points.
    """
    n = len(features)
    if n < 2 * points:
        raise ValueError(f"FID at infinity needs at least {2 * points} samples, got {n}")
    if fewest is None:
        fewest = 5000 if n >= 10_000 else n // 10
    random = np.random.RandomState(seed)
    sizes = np.linspace(fewest, n, points).astype(int)
    subsets = [select_rows(features, random.choice(n, size, replace=False)) for size in sizes]
    values = [frechet_of_features(subset, reference) for subset in subsets]
    from scipy import stats  # import cost

    fit = stats.linregress(1 / sizes, values)
    return float(fit.intercept), float(fit.intercept_stderr)
