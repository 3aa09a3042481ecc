"""Aggregates replicates into one point whose interval includes the variance between training seeds."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable

import numpy as np
import pandas as pd
from pandas.core.groupby import DataFrameGroupBy
from scipy import stats

from diffscale.report.stats.facets import is_distance

MEANS = [
    "epochs",
    "train_flops",
    "device_seconds",
    "energy_joules",
    "cost",
    "value_heldout",
    "value_native",
    "memorisation",
    "val_loss",
]
FIRSTS = [
    "recipe_label",
    "model",
    "parameters",
    "schedule",
    "input_scale",
    "dataset",
    "dataset_hash",
    "train_resolution",
    "ema",
    "endpoint",
    "device",
    "devices",
    "flops_per_image",
    "forward_macs",
    "metric",
    "network",
    "reference",
    "eval_resolution",
    "n_generated",
    "n_reference",
    "solver",
    "nfe",
    "guidance_scale",
    "sampler",
    "resize",
    "sampling_flops",
    "settings",
]
NORMAL_95 = 1.959964


def transform(metric: str) -> tuple[Callable, Callable]:
    """Return (forward, backward) of the scale with even noise: the logarithm for Fréchet distances, else the value."""
    if is_distance(metric):
        return lambda value: np.log(np.maximum(value, 1e-12)), np.exp
    return lambda value: np.asarray(value, dtype=float), lambda value: value


def aggregate(rows: pd.DataFrame) -> pd.DataFrame:
    """Return one row for each (facet, recipe, images_seen).

    `value` is the mean over seeds (geometric for distances), nan if one of them diverged. `value_low`/`value_high` is
    its 95 % t-interval, `se` the standard error and `spread` the standard deviation of a single seed, both on the scale
    of `transform`; `df` are the degrees of freedom. `noise` says what the interval holds:

    - `seeds`: the spread between seeds, pooled over all replicated points of the same backbone in the facet. A point
      with one seed gets its interval from points with more. Never less than the noise of the evaluation itself.
    - `seeds of all backbones`: the same, pooled over backbones, if one backbone gives fewer than 2 degrees of freedom.
    - `evaluation`: nothing was replicated; only the metric's own interval is known.
    - `unknown`: the metric has no interval either.
    """
    if rows.empty:
        return pd.DataFrame(columns=["facet", "recipe", "images_seen", *MEANS, *FIRSTS, "seeds", "value"])
    parts = [_aggregate_metric(part, str(metric)) for metric, part in rows.groupby("metric", sort=True)]
    points = pd.concat(parts, ignore_index=True)
    return points.sort_values(["facet", "model", "recipe", "images_seen"], ignore_index=True)


def _aggregate_metric(rows: pd.DataFrame, metric: str) -> pd.DataFrame:
    forward, backward = transform(metric)
    with np.errstate(invalid="ignore"):
        measured = rows.assign(
            _y=forward(rows["value"].to_numpy(float)),
            _evaluation=(forward(rows["value_high"].to_numpy(float)) - forward(rows["value_low"].to_numpy(float)))
            / (2 * NORMAL_95),
        )
    cell = ["facet", "recipe", "images_seen"]
    by_run = measured.groupby([*cell, "run_id"], sort=True)
    per_run = by_run.agg(_evaluation=("_evaluation", "max")).assign(_y=_means(by_run)).reset_index()
    runs = per_run.groupby(cell, sort=True)
    points = runs.agg(seeds=("_y", "size"), _s2=("_y", "var"), _evaluation=("_evaluation", "mean"))
    ids: dict[tuple, list[str]] = {}
    for *key, run in per_run[[*cell, "run_id"]].itertuples(index=False, name=None):
        ids.setdefault(tuple(key), []).append(run)
    points = points.assign(_y=_means(runs), runs=[" ".join(ids[key]) for key in points.index])
    grouped = measured.groupby(cell, sort=True)
    points = points.join(grouped[MEANS].mean()).join(grouped[FIRSTS].first()).reset_index()
    points["value"] = backward(points["_y"])
    return _with_intervals(points, backward).drop(columns=["_y", "_s2", "_evaluation"])


def _means(groups: DataFrameGroupBy) -> pd.Series:
    """Return the mean `_y` of each group, which is nan if a value is: pandas would leave a diverged seed out."""
    found = groups["_y"].agg(["mean", "size", "count"])
    return found["mean"].where(found["size"] == found["count"])


def _with_intervals(points: pd.DataFrame, backward: Callable) -> pd.DataFrame:
    pooled = _pooled_variances(points)
    spread, df, noise = [], [], []
    for facet, model, evaluation in zip(points["facet"], points["model"], points["_evaluation"], strict=True):
        own, everyone = pooled.get((facet, model), (0.0, 0)), pooled.get((facet, None), (0.0, 0))
        variance, freedom = own if own[1] >= 2 else everyone
        floor = 0.0 if math.isnan(evaluation) else float(evaluation) ** 2
        spread.append(math.sqrt(max(variance, floor)) if freedom or floor else math.nan)
        df.append(float(freedom) if freedom else math.inf)
        noise.append(
            ("seeds" if own[1] >= 2 else "seeds of all backbones") if freedom else "evaluation" if floor else "unknown"
        )
    points = points.assign(spread=spread, df=df, noise=noise)
    points["se"] = points["spread"] / np.sqrt(points["seeds"])
    half = stats.t.ppf(0.975, points["df"]) * points["se"]
    points["value_low"], points["value_high"] = backward(points["_y"] - half), backward(points["_y"] + half)
    return points


def _pooled_variances(points: pd.DataFrame) -> dict[tuple[Hashable, Hashable], tuple[float, int]]:
    """Return the variance between seeds and its degrees of freedom, by (facet, model) and by (facet, None)."""
    replicated = points[(points["seeds"] > 1) & points["_y"].notna()]
    freedom = replicated["seeds"] - 1
    parts = pd.DataFrame(
        {"facet": replicated["facet"], "model": replicated["model"], "ss": replicated["_s2"] * freedom, "df": freedom}
    )
    pooled: dict[tuple[Hashable, Hashable], tuple[float, int]] = {}
    for facet, part in parts.groupby("facet"):
        pooled[(facet, None)] = (float(part["ss"].sum() / part["df"].sum()), int(part["df"].sum()))
        for model, own in part.groupby("model"):
            pooled[(facet, model)] = (float(own["ss"].sum() / own["df"].sum()), int(own["df"].sum()))
    return pooled
