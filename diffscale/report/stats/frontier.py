"""Pareto frontiers: the best value reached with a given training compute, and curves read at any compute."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from diffscale.records.schema import higher_is_better
from diffscale.report.stats.aggregate import transform
from diffscale.report.stats.facets import CURVE, FAIR_ENDPOINTS

EQUAL_COMPUTE = 0.02
"""Ratio within which two computes count as equal."""
SCOPES = {"overall": [], "backbone": ["model"], "resolution": ["train_resolution"]}


def fair(points: pd.DataFrame) -> pd.DataFrame:
    """Keep the points that are the end of a run of their budget; an untrained network is none."""
    return points[points["endpoint"].isin(FAIR_ENDPOINTS) & (points["train_flops"] > 0)]


def measured(points: pd.DataFrame) -> pd.DataFrame:
    """Keep the points with a value: a run that diverged has none."""
    return points[points["value"].notna()]


def is_on_frontier(
    compute: ArrayLike, values: ArrayLike, higher: bool = False, step: ArrayLike | None = None
) -> np.ndarray:
    """Return (n,) bool: no cheaper or equally cheap point is as good. Of points equal in both, the first is kept.

    Computes within EQUAL_COMPUTE of each other, or within one optimisation step, are equally cheap: runs of one budget
    end at whole steps, and a rounding is no advantage. A value that is not finite is worse than any other.

    compute: (n,) FLOPs
    values: (n,)
    higher: whether a higher value is better
    step: (n,) FLOPs of one optimisation step of each point; None: exactly equal computes alone are equal
    """
    cost = np.asarray(compute, float)
    signed = -np.asarray(values, float) if higher else np.asarray(values, float)
    signed = np.where(np.isfinite(signed), signed, np.inf)
    room = np.zeros_like(cost) if step is None else np.fmax(np.asarray(step, float), EQUAL_COMPUTE * cost)
    order = np.lexsort((cost, signed))  # the best value first, and of equal values the cheapest
    mask = np.zeros(len(signed), dtype=bool)
    cheapest = np.inf  # of the points that are as good or better
    for i in order[: np.isfinite(signed).sum()]:  # at the end, what is not finite is on no frontier
        mask[i] = cost[i] < cheapest - room[i]
        cheapest = min(cheapest, cost[i])
    return mask


def on_frontier(points: pd.DataFrame) -> np.ndarray:
    """Return (n,) bool: the points of one metric that no cheaper or equally cheap one matches."""
    batch = [settings.get("train.global_batch", 0) for settings in points["settings"]]
    step = points["flops_per_image"].to_numpy(float) * np.asarray(batch, float)
    return is_on_frontier(points["train_flops"], points["value"], higher_is_better(points["metric"].iloc[0]), step)


def pareto(points: pd.DataFrame) -> pd.DataFrame:
    """Return the frontier of each facet: overall, for each backbone and for each training resolution."""
    parts = []
    for scope, by in SCOPES.items():
        for key, part in fair(points).groupby(["facet", *by], sort=True):
            on = on_frontier(part)
            where = str(key[1]) if by else ""
            parts.append(part[on].assign(scope=scope, scope_value=where).sort_values("train_flops"))
    if not parts:
        return points.head(0).assign(scope=[], scope_value=[])
    return pd.concat(parts, ignore_index=True)


@dataclass(frozen=True)
class Curve:
    """One backbone at one resolution on one training set within a facet, cheapest point first.

    The points of one recipe, or the lower envelope of several.
    """

    facet: str
    model: str
    train_resolution: int
    dataset_hash: str
    points: pd.DataFrame
    recipes: int

    @property
    def compute(self) -> np.ndarray:
        return self.points["train_flops"].to_numpy(float)

    @property
    def values(self) -> np.ndarray:
        return self.points["value"].to_numpy(float)

    @property
    def metric(self) -> str:
        return str(self.points["metric"].iloc[0])

    def name(self, several_resolutions: bool) -> str:
        return f"{self.model} {self.train_resolution}²" if several_resolutions else self.model


def curves(points: pd.DataFrame) -> list[Curve]:
    """Return the curves of all facets, without points of diverged runs."""
    found = []
    for _, part in measured(fair(points)).groupby(CURVE, sort=True):
        recipes = part["recipe"].nunique()
        if recipes > 1:
            part = part[on_frontier(part)]
        part, first = part.sort_values("train_flops"), part.iloc[0]
        facet, model, resolution, dataset = (first[name] for name in CURVE)
        found.append(Curve(facet, model, resolution, dataset, part, recipes))
    return found


@dataclass(frozen=True)
class Reading:
    """A value read from a curve at some compute. known: a training seed was repeated."""

    value: float
    low: float
    high: float
    known: bool
    interpolated: bool


def read_at(points: pd.DataFrame, compute: float, tolerance: float = EQUAL_COMPUTE) -> Reading | None:
    """Return the value at `compute` FLOPs: a point within `tolerance` (a ratio), or an interpolation; None outside.

    Interpolation is linear in log compute on the scale of `transform`. It takes the wider (in ratio) of the
    neighbours' intervals.
    """
    x = np.log(points["train_flops"].to_numpy(float))
    forward, backward = transform(str(points["metric"].iloc[0]))
    value, low, high = (forward(points[c].to_numpy(float)) for c in ("value", "value_low", "value_high"))
    known = points["noise"].str.startswith("seeds").to_numpy()
    target = np.log(compute)
    near = int(np.argmin(np.abs(x - target)))
    if abs(x[near] - target) <= np.log1p(tolerance):
        row = points.iloc[near]
        return Reading(row["value"], row["value_low"], row["value_high"], bool(known[near]), False)
    right = int(np.searchsorted(x, target))
    if right in (0, len(x)):
        return None
    left = right - 1
    middle = float(np.interp(target, x[left : right + 1], value[left : right + 1]))
    below = max(value[left] - low[left], value[right] - low[right])
    above = max(high[left] - value[left], high[right] - value[right])
    return Reading(
        float(backward(middle)),
        float(backward(middle - below)),
        float(backward(middle + above)),
        bool(known[left] and known[right]),
        True,
    )


def first_reach(points: pd.DataFrame, targets: list[float], columns: list[str]) -> NDArray:
    """Return (targets, columns): how much of each column a curve had used when it first reached each target.

    points: sorted by train_flops.
    columns: train_flops, device_seconds, ...
    A cost is interpolated log-log between two points, is the first point's if that point reached the target already,
    and is NaN if the target was never reached or the column is empty.
    """
    metric = str(points["metric"].iloc[0])
    forward, _ = transform(metric)
    sign = -1.0 if higher_is_better(metric) else 1.0
    y = sign * forward(points["value"].to_numpy(float))
    goals = sign * forward(np.asarray(targets, float))
    reached = y <= goals[:, None]
    first = reached.argmax(axis=1)
    last = np.maximum(first - 1, 0)
    costs = points[columns].to_numpy(float)
    at, before = costs[first], costs[last]
    with np.errstate(divide="ignore", invalid="ignore"):
        share = ((y[last] - goals) / (y[last] - y[first]))[:, None]
        between = np.exp(np.log(before) + share * (np.log(at) - np.log(before)))
        known = (first > 0)[:, None] & np.isfinite(before) & (before > 0) & (at > 0)
    found = np.where(known & np.isfinite(at), between, at)
    return np.where(reached.any(axis=1)[:, None] & np.isfinite(at), found, np.nan)
