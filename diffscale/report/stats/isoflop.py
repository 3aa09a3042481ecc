"""Iso-FLOP laws: the loss of one backbone over sizes and budgets, its best size and images, and its loss further out.

    log L(N, C) = log(E + A (C / C0)^-alpha) + c (log N - log N_opt(C))^2,     N_opt(C) = N0 (C / C0)^a

The parabolas of all budgets share their curvature c, because three sizes determine a parabola and leave nothing to
judge it by. After Hoffmann et al., "Training compute-optimal large language models" (arXiv 2203.15556), approach 2,
fitted in one piece; Liang et al. fit the same to diffusion transformers (arXiv 2410.08184: N_opt ~ C^0.57, images ~
C^0.43).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray
from scipy import stats
from scipy.optimize import least_squares

from diffscale.report.stats.facets import FAIR_ENDPOINTS

NAMES = ("log_scale", "log_alpha", "log_floor", "log_curvature", "log_size", "size_exponent")
LOW = np.array([-30.0, np.log(0.01), -40.0, np.log(1e-5), -60.0, -1.0])
HIGH = np.array([30.0, np.log(2.0), 30.0, np.log(10.0), 60.0, 2.0])
FEWEST_BUDGETS, FEWEST_SIZES = 3, 3
SAME_BUDGET = 1.1
"""Ratio within which two computes are one budget: runs end at whole steps."""


@dataclass(frozen=True)
class IsoFlop:
    """The fitted law of one backbone.

    parameters: in the order of NAMES
    covariance: of the parameters
    noise: standard deviation of log L of one run
    freedom: degrees of freedom of the noise
    reference: C0, in FLOPs
    cost: (intercept, slope) of log(FLOPs of one image) against log N
    """

    parameters: NDArray
    covariance: NDArray
    noise: float
    freedom: float
    reference: float
    cost: tuple[float, float]

    def size(self, compute: ArrayLike) -> NDArray:
        """Return (3, n): the best number of parameters for each compute in FLOPs, and its 95 % interval."""
        x = np.log(np.asarray(compute, float) / self.reference)
        gradient = np.zeros((len(x), len(NAMES)))
        gradient[:, 4], gradient[:, 5] = 1, x
        return self._interval(self.parameters[4] + self.parameters[5] * x, gradient)

    def images(self, compute: ArrayLike) -> NDArray:
        """Return (3, n): the images that the best size sees with each compute, and the 95 % interval."""
        best, low, high = self.size(compute)
        per_image = [np.exp(self.cost[0] + self.cost[1] * np.log(n)) for n in (best, high, low)]
        return np.asarray(compute, float) / np.stack(per_image)

    def loss(self, compute: ArrayLike, of: str = "curve") -> NDArray:
        """Return (3, n): the loss of the best size with each compute, and its 95 % interval.

        of: "curve", or "run" for that of one new run, whose noise it holds too
        """
        x = np.log(np.asarray(compute, float) / self.reference)
        value, gradient = _envelope(self.parameters, x)
        return self._interval(value, gradient, self.noise if of == "run" else 0.0)

    def at(self, parameters: ArrayLike, compute: float) -> NDArray:
        """Return the loss (n,) of networks of these sizes with one compute."""
        sizes = np.log(np.asarray(parameters, float))
        x = np.full_like(sizes, np.log(compute / self.reference))
        return np.exp(_log_loss(self.parameters, x, sizes))

    def exponents(self) -> dict[str, tuple[float, float, float]]:
        """Return the exponent of N_opt, of the images and of the loss against compute, each with its 95 % interval."""
        size = self._pick(5)
        images = (1 - self.cost[1] * size[0], 1 - self.cost[1] * size[2], 1 - self.cost[1] * size[1])
        alpha = tuple(float(np.exp(v)) for v in self._pick(1))
        return {"parameters": size, "images": images, "loss": alpha}  # type: ignore[dict-item]

    def _pick(self, i: int) -> tuple[float, float, float]:
        half = float(stats.t.ppf(0.975, self.freedom) * np.sqrt(self.covariance[i, i]))
        value = float(self.parameters[i])
        return value, value - half, value + half

    def _interval(self, value: NDArray, gradient: NDArray, noise: float = 0.0) -> NDArray:
        variance = np.einsum("ni,ij,nj->n", gradient, self.covariance, gradient) + noise**2
        half = stats.t.ppf(0.975, self.freedom) * np.sqrt(variance)
        return np.exp(np.stack([value, value - half, value + half]))


def fit_isoflop(
    parameters: ArrayLike,
    compute: ArrayLike,
    loss: ArrayLike,
    flops_per_image: ArrayLike,
    spread: float = np.nan,
    df: float = 0,
) -> IsoFlop | None:
    """Fit the law to runs of one backbone; None without three budgets of three sizes each.

    parameters, compute, loss, flops_per_image: (n,) of each run, at the end of its budget
    spread: standard deviation of log loss between training seeds, with `df` degrees of freedom

    Intervals are Student's t of the linearised fit: nine runs leave too few residuals to resample. Their coverage is
    tested in simulation.
    """
    size, compute, loss = (np.asarray(v, float) for v in (parameters, compute, loss))
    budgets = budgets_of(compute)
    sizes_of = [len(np.unique(size[budgets == b])) for b in np.unique(budgets)]
    if sum(n >= FEWEST_SIZES for n in sizes_of) < FEWEST_BUDGETS or not (loss > 0).all():
        return None
    reference = float(np.exp(np.log(compute).mean()))
    x, y, s = np.log(compute / reference), np.log(loss), np.log(size)
    starts = [np.clip(_start(x, y, s, budgets, share), LOW, HIGH) for share in (0.3, 0.8)]
    fits = [least_squares(lambda theta: _log_loss(theta, x, s) - y, start, bounds=(LOW, HIGH)) for start in starts]
    found = min(fits, key=lambda fit: fit.cost)
    squares, freedom = 2 * float(found.cost), float(len(y) - len(NAMES))
    if np.isfinite(spread) and np.isfinite(df):
        squares, freedom = squares + df * spread**2, freedom + df
    if freedom <= 0:
        return None
    noise = float(np.sqrt(squares / freedom))
    covariance = noise**2 * np.linalg.pinv(found.jac.T @ found.jac)
    slope, intercept = np.polyfit(s, np.log(np.asarray(flops_per_image, float)), 1)
    return IsoFlop(found.x, covariance, noise, freedom, reference, (float(intercept), float(slope)))


def budgets_of(compute: NDArray) -> NDArray:
    """Return the number of the budget of each run, the smallest first."""
    order = np.argsort(compute)
    steps = np.diff(np.log(compute[order]), prepend=np.log(compute[order[0]])) > np.log(SAME_BUDGET)
    numbers = np.empty(len(compute), int)
    numbers[order] = np.cumsum(steps)
    return numbers


def _start(x: NDArray, y: NDArray, s: NDArray, budgets: NDArray, share: float) -> NDArray:
    """Return parameters from a parabola for each budget. share: of the lowest loss that is the floor."""
    tops, curvatures, where = [], [], []
    for b in np.unique(budgets):
        own = budgets == b
        c, slope, _ = np.polyfit(s[own], y[own], 2) if len(np.unique(s[own])) >= 3 else (0.01, 0.0, 0.0)
        curvatures.append(max(c, 1e-3))
        tops.append(np.clip(-slope / (2 * max(c, 1e-3)), s[own].min() - 1, s[own].max() + 1))
        where.append((x[own].mean(), y[own].min()))
    at, best = np.array(where).T
    size_exponent, log_size = np.polyfit(at, tops, 1)
    floor = y.min() + np.log(share)
    falling = np.log(np.maximum(np.exp(best) - np.exp(floor), 1e-9))
    slope, log_scale = np.polyfit(at, falling, 1)
    curvature = np.log(np.clip(np.median(curvatures), 1e-4, 1.0))
    return np.array(
        [log_scale, np.log(np.clip(-slope, 0.02, 1.5)), floor, curvature, log_size, np.clip(size_exponent, -0.5, 1.5)]
    )


def _envelope(theta: NDArray, x: NDArray) -> tuple[NDArray, NDArray]:
    """Return log of the loss of the best size (n,), and its derivatives (n, 6)."""
    alpha = np.exp(theta[1])
    falling, floor = np.exp(theta[0] - alpha * x), np.exp(theta[2])
    share = falling / (falling + floor)
    gradient = np.zeros((len(x), len(NAMES)))
    gradient[:, 0], gradient[:, 1], gradient[:, 2] = share, -share * alpha * x, 1 - share
    return np.log(falling + floor), gradient


def _log_loss(theta: NDArray, x: NDArray, s: NDArray) -> NDArray:
    return _envelope(theta, x)[0] + np.exp(theta[3]) * (s - theta[4] - theta[5] * x) ** 2


# ---- the runs of a report

LOSS_GROUP = [
    "model",
    "dataset_hash",
    "train_resolution",
    "schedule",
    "interpolant",
    "prediction",
    "weighting",
    "input_scale",
    "endpoint",
]
"""Validation losses are comparable only where all of these columns agree."""
COLUMNS = [
    *LOSS_GROUP,
    "runs",
    "budgets",
    "largest_flops",
    "noise_percent",
    "size_exponent",
    "size_exponent_low",
    "size_exponent_high",
    "images_exponent",
    "images_exponent_low",
    "images_exponent_high",
    "loss_exponent",
    "loss_exponent_low",
    "loss_exponent_high",
    "heldout_flops",
    "heldout_loss",
    "predicted_loss",
    "predicted_low",
    "predicted_high",
    "heldout_error_percent",
    "heldout_inside",
]


def ends_with_loss(rows: pd.DataFrame) -> pd.DataFrame:
    """Return one row for each checkpoint that is the end of a run of its budget and has a validation loss."""
    known = rows[rows["val_loss"].notna() & rows["endpoint"].isin(FAIR_ENDPOINTS) & (rows["train_flops"] > 0)]
    return known.drop_duplicates(["run_id", "images_seen", "ema"])


def seed_spread(ends: pd.DataFrame) -> tuple[float, int]:
    """Return the standard deviation of log loss between training seeds and its degrees of freedom; (nan, 0) if none."""
    logs = np.log(ends["val_loss"].to_numpy(float))
    groups = pd.Series(logs).groupby([ends["recipe"].to_numpy(), ends["images_seen"].to_numpy()])
    freedom = int((groups.size() - 1).sum())
    return (float(np.sqrt((groups.var() * (groups.size() - 1)).sum() / freedom)), freedom) if freedom else (np.nan, 0)


def fit_ends(ends: pd.DataFrame) -> IsoFlop | None:
    """Fit the law to the ends of one LOSS_GROUP."""
    spread, freedom = seed_spread(ends)
    numbers, compute, loss, per_image = (
        ends[name].to_numpy(float) for name in ("parameters", "train_flops", "val_loss", "flops_per_image")
    )
    return fit_isoflop(numbers, compute, loss, per_image, spread, freedom)


def isoflop(rows: pd.DataFrame) -> tuple[pd.DataFrame, dict[tuple, IsoFlop]]:
    """Return a table of the laws of every LOSS_GROUP with enough runs, and the laws by group.

    The largest budget is predicted from the others, so that the error of such a prediction is known.
    """
    found, laws = [], {}
    for group, ends in ends_with_loss(rows).groupby(LOSS_GROUP, sort=True):
        law = fit_ends(ends)
        if law is None:
            continue
        laws[group] = law
        row = dict(zip(LOSS_GROUP, group, strict=True)) | {
            "runs": len(ends),
            "budgets": int(budgets_of(ends["train_flops"].to_numpy(float)).max()) + 1,
            "largest_flops": float(ends["train_flops"].max()),
            "noise_percent": 100 * law.noise,
        }
        for name, key in (("size", "parameters"), ("images", "images"), ("loss", "loss")):
            row |= dict(
                zip([f"{name}_exponent{end}" for end in ("", "_low", "_high")], law.exponents()[key], strict=True)
            )
        found.append(row | _heldout(ends))
    return pd.DataFrame(found, columns=COLUMNS), laws


def _heldout(ends: pd.DataFrame) -> dict[str, float | bool]:
    """Return how well the other budgets predict the best loss of the largest one."""
    number = budgets_of(ends["train_flops"].to_numpy(float))
    last = ends[number == number.max()]
    law = fit_ends(ends[number < number.max()])
    best = last.loc[last["val_loss"].idxmin()]
    if law is None:
        return {}
    value, low, high = (float(v[0]) for v in law.loss([best["train_flops"]], of="run"))
    return {
        "heldout_flops": float(best["train_flops"]),
        "heldout_loss": float(best["val_loss"]),
        "predicted_loss": value,
        "predicted_low": low,
        "predicted_high": high,
        "heldout_error_percent": 100 * (value / float(best["val_loss"]) - 1),
        "heldout_inside": bool(low <= best["val_loss"] <= high),
    }
