"""Scaling of each backbone with compute: power laws, where one overtakes another, and a test of their predictions."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pandas as pd

from diffscale.report.stats.facets import is_distance
from diffscale.report.stats.frontier import Curve
from diffscale.report.stats.power_law import FEWEST_POINTS, Fit, fit

FIT_COLUMNS = [
    "facet",
    "kind",
    "model",
    "train_resolution",
    "dataset_hash",
    "overtakes",
    "points",
    "recipes",
    "flops_from",
    "flops_to",
    "floor",
    "floor_low",
    "floor_high",
    "exponent",
    "exponent_low",
    "exponent_high",
    "rms_percent",
    "predicted_flops",
    "predicted",
    "predicted_low",
    "predicted_high",
    "heldout_flops",
    "heldout_measured",
    "heldout_predicted",
    "heldout_low",
    "heldout_high",
    "heldout_error_percent",
    "heldout_inside",
    "crossing_flops",
    "crossing_low",
    "crossing_high",
    "crossing_probability",
    "note",
]
BEYOND = 10.0
"""Factor by which predictions go beyond a curve's largest compute."""


def fit_curve(curve: Curve) -> Fit | None:
    """Fit a curve; None if the metric is not a distance or there are fewer than three different compute points."""
    return fit_points(curve.points) if is_distance(curve.metric) else None


def fit_points(points: pd.DataFrame) -> Fit | None:
    """Fit the points of a curve with the noise that they state."""
    spread = points["se"].to_numpy(float)
    known = spread[np.isfinite(spread)]
    size = float(np.sqrt(np.mean(known**2))) if len(known) else np.nan
    return fit(points["train_flops"].to_numpy(float), points["value"].to_numpy(float), size, float(points["df"].min()))


def scaling(all_curves: list[Curve]) -> tuple[pd.DataFrame, dict[tuple, Fit]]:
    """Return the table of fits (kind `fit`, one row per curve) and crossings (kind `crossing`), and the fits.

    The fits are keyed by (facet, model, train_resolution, dataset_hash).
    """
    fits: dict[tuple, Fit] = {}
    rows = []
    for curve in all_curves:
        if not is_distance(curve.metric):
            continue
        found = fit_curve(curve)
        rows.append(_fit_row(curve, found))
        if found is not None:
            fits[_key(curve)] = found
    for a, b in combinations([c for c in all_curves if _key(c) in fits], 2):
        same = (a.facet, a.dataset_hash, a.train_resolution) == (b.facet, b.dataset_hash, b.train_resolution)
        if same and (row := _crossing_row(a, b, fits[_key(a)], fits[_key(b)])):
            rows.append(row)
    table = pd.DataFrame(rows, columns=FIT_COLUMNS)
    return table.sort_values(["facet", "kind", "train_resolution", "model"], ascending=[True, False, True, True]), fits


def _key(curve: Curve) -> tuple:
    return curve.facet, curve.model, curve.train_resolution, curve.dataset_hash


def _identity(curve: Curve, kind: str) -> dict[str, object]:
    return {
        "facet": curve.facet,
        "kind": kind,
        "model": curve.model,
        "train_resolution": curve.train_resolution,
        "dataset_hash": curve.dataset_hash,
        "points": len(curve.points),
        "recipes": curve.recipes,
        "flops_from": curve.compute[0],
        "flops_to": curve.compute[-1],
    }


def _fit_row(curve: Curve, found: Fit | None) -> dict[str, object]:
    row = _identity(curve, "fit")
    if found is None:
        return {**row, "note": f"{len(curve.points)} compute points on the curve, a fit needs {FEWEST_POINTS}"}
    target = np.array([BEYOND * curve.compute[-1]])
    low, high = found.interval(target, of="measurement")
    floor, exponent = (np.quantile(x, [0.025, 0.975]) for x in (found.bootstrap.floor, found.bootstrap.exponent))
    free = found.law.parameters() == 3 or found.points > FEWEST_POINTS
    row |= {
        "floor": found.law.floor[0],
        "floor_low": floor[0],
        "floor_high": floor[1],
        "exponent": found.law.exponent[0],
        "exponent_low": exponent[0],
        "exponent_high": exponent[1],
        "rms_percent": 100 * found.rms,
        "predicted_flops": target[0],
        "predicted": found.law(target)[0, 0],
        "predicted_low": low[0],
        "predicted_high": high[0],
        "note": "" if free else "three points: the floor is taken as 0",
    }
    return row | _held_out(curve)


def _held_out(curve: Curve) -> dict[str, object]:
    """Predict the last point from the earlier ones."""
    found = fit_points(curve.points.iloc[:-1])
    if found is None:
        return {}
    last = curve.compute[-1:]
    low, high = found.interval(last, of="measurement")
    predicted, measured = float(found.law(last)[0, 0]), float(curve.values[-1])
    return {
        "heldout_flops": last[0],
        "heldout_measured": measured,
        "heldout_predicted": predicted,
        "heldout_low": low[0],
        "heldout_high": high[0],
        "heldout_error_percent": 100 * (predicted / measured - 1),
        "heldout_inside": bool(low[0] <= measured <= high[0]),
    }


def _crossing_row(a: Curve, b: Curve, fit_a: Fit, fit_b: Fit) -> dict[str, object] | None:
    """Return where the curve that is worse at small compute becomes better, within the predicted range."""
    grid = np.geomspace(min(a.compute[0], b.compute[0]), BEYOND * max(a.compute[-1], b.compute[-1]), 400)
    difference = np.log(fit_a.law(grid)) - np.log(fit_b.law(grid))
    place = _last_crossing(difference, grid)[0]
    if not np.isfinite(place):
        return None
    winner, loser = (a, b) if difference[0, -1] < 0 else (b, a)
    resampled = np.log(fit_a.bootstrap(grid)) - np.log(fit_b.bootstrap(grid))
    same_winner = np.sign(resampled[:, -1]) == np.sign(difference[0, -1])
    crossed = _last_crossing(resampled, grid)[same_winner]
    crossed = crossed[np.isfinite(crossed)]
    low, high = np.quantile(crossed, [0.025, 0.975]) if len(crossed) else (np.nan, np.nan)
    return {
        **_identity(winner, "crossing"),
        "overtakes": loser.model,
        "crossing_flops": place,
        "crossing_low": low,
        "crossing_high": high,
        "crossing_probability": len(crossed) / len(resampled),
        "note": "" if place <= min(a.compute[-1], b.compute[-1]) else "beyond what was trained: an extrapolation",
    }


def _last_crossing(difference: np.ndarray, grid: np.ndarray) -> np.ndarray:
    """Return the compute of each row's last change of sign, or NaN. difference (B, n) of logs, grid (n,)."""
    changes = np.sign(difference[:, :-1]) * np.sign(difference[:, 1:]) < 0
    index = changes.shape[1] - 1 - np.argmax(changes[:, ::-1], axis=1)
    row = np.arange(len(difference))
    before, after = difference[row, index], difference[row, index + 1]
    share = before / np.where(before == after, 1.0, before - after)
    share = np.clip(share, 0, 1)
    crossing = np.exp(np.log(grid[index]) + share * (np.log(grid[index + 1]) - np.log(grid[index])))
    return np.where(changes.any(axis=1), crossing, np.nan)
