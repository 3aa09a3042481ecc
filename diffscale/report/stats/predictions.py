"""The laws of a recommendation: loss over sizes and budgets, distance over budgets, and how their predictions fared."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd

from diffscale.records.recommendation import Searched
from diffscale.report.stats.isoflop import IsoFlop, fit_isoflop
from diffscale.report.stats.power_law import Fit, fit


@dataclass(frozen=True)
class DistanceLaw:
    """The distance of the best size at each budget against compute."""

    compute: np.ndarray
    values: np.ndarray
    fit: Fit

    def predict(self, flops: float) -> tuple[float, float, float]:
        """Return the distance of a new run with this compute, and its 95 % interval."""
        target = np.array([flops])
        low, high = self.fit.interval(target, of="measurement")
        return float(self.fit.law(target)[0, 0]), float(low[0]), float(high[0])


def loss_law(part: Searched) -> IsoFlop | None:
    """Return the law of a backbone's validation loss; None with fewer than three budgets of three sizes."""
    table = points_of(part)
    parameters, flops, loss, per_image = (
        table[name].to_numpy(float) for name in ("parameters", "flops", "val_loss", "flops_per_image")
    )
    return fit_isoflop(parameters, flops, loss, per_image)


def distance_law(part: Searched) -> DistanceLaw | None:
    """Return the law of the distance of the size with the lowest loss; None with fewer than three budgets."""
    table = points_of(part)
    means = table.groupby(["budget", "rung"])[["flops", "val_loss", "distance"]].mean().reset_index()
    best = means.loc[means.groupby("budget")["val_loss"].idxmin()]
    spread, freedom = _seed_spread(table)
    compute, values = best["flops"].to_numpy(float), best["distance"].to_numpy(float)
    found = fit(compute, values, spread, freedom) if (values > 0).all() else None
    return None if found is None else DistanceLaw(compute, values, found)


def backtest(part: Searched) -> tuple[float, bool] | None:
    """Predict the loss at the largest budget from the others. Return the error in percent, and whether it was inside.

    None where the other budgets are too few for a law.
    """
    last = max(point.budget for point in part.points)
    law = loss_law(part.model_copy(update={"points": tuple(p for p in part.points if p.budget < last)}))
    table = points_of(part)
    means = table[table["budget"] == last].groupby("rung")[["flops", "val_loss"]].mean()
    if law is None or means.empty:
        return None
    flops, measured = means.sort_values("val_loss")[["flops", "val_loss"]].to_numpy(float)[0]
    value, low, high = (float(v[0]) for v in law.loss([flops], of="run"))
    return 100 * (value / measured - 1), bool(low <= measured <= high)


def points_of(part: Searched) -> pd.DataFrame:
    """Return the ends of a backbone's runs that did not diverge."""
    table = pd.DataFrame([point.model_dump() for point in part.points])
    return table[np.isfinite(table["val_loss"])] if len(table) else table


def _seed_spread(table: pd.DataFrame) -> tuple[float, int]:
    """Return the standard deviation between seeds of log distance, and its degrees of freedom; (nan, 0)."""
    logs = pd.Series(np.log(table["distance"].to_numpy(float)), index=table.index)
    groups = logs.groupby([table["rung"], table["budget"]])
    freedom = int((groups.size() - 1).sum())
    if not freedom:
        return np.nan, 0
    return float(np.sqrt((groups.var() * (groups.size() - 1)).sum() / freedom)), freedom
