"""Iso-FLOP laws: the loss of one backbone over sizes and budgets, its best size and images, and its loss further out.

    log L(N, C) = log(E + A (C / C0)^-alpha) + c (log N - log N_opt(C))^2,     N_opt(C) = N0 (C / C0)^a

The parabolas of all budgets share their curvature c, because three sizes determine a parabola and leave nothing to
judge it by. Published exponents a of the best size count as one more measurement: a few short runs hardly determine it,
and what lies far beyond them rests on it. A parabola holds near its minimum, and a network that is far too small is
much worse than it says: a run counts the less, the further its loss is above the best one of its budget. After Hoffmann
et al., "Training compute-optimal large language models" (arXiv 2203.15556), approach 2, fitted in one piece; Liang et
al. fit the same to diffusion transformers (arXiv 2410.08184: N_opt ~ C^0.57, images ~ C^0.43).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from diffscale.report.stats.facets import FAIR_ENDPOINTS
from diffscale.report.stats.least_squares import levenberg_marquardt

NAMES = ("log_scale", "log_alpha", "log_floor", "log_curvature", "log_size", "size_exponent")
LOW = np.array([-30.0, np.log(0.01), -40.0, np.log(1e-5), -60.0, 0.25])
HIGH = np.array([30.0, np.log(2.0), 30.0, np.log(10.0), 60.0, 0.85])
"""Bounds of the parameters."""
PUBLISHED_EXPONENT, EXPONENT_SPREAD = 0.52, 0.08
"""Exponent of the best size, and the standard deviation of its measurements: Hoffmann et al. have 0.46 to 0.50 by three
approaches, Liang et al. 0.57 for diffusion transformers. Porian et al. (arXiv 2406.19146) trace the 0.73 of Kaplan et
al. (arXiv 2001.08361) to warm-up and learning rates that do not fit the budget, and agree with Hoffmann et al. else."""
FEWEST_BUDGETS, FEWEST_SIZES = 3, 3
NEAR = 0.2
"""Distance of log loss from the best one at a budget at which a run's square counts half. It matters for networks that
are far too small; without such, equal weights predict as well (benchmarks/README.md)."""
RESAMPLES = 400
SAME_BUDGET, SAME_SIZE = 1.1, 1.005
"""Ratios within which two computes are one budget (runs end at whole steps), and two networks are of one size."""


@dataclass(frozen=True)
class IsoFlop:
    """The fitted law of one backbone.

    parameters: (6,) in the order of NAMES
    bootstrap: (B, 6), those of each resample
    noise: (B,) standard deviation of log L of one run, in each resample
    rms: the same of the residuals
    alone: (1 + B, 6), the parameters without published exponents, and those of each resample
    reference: C0, in FLOPs
    cost: (intercept, slope) of log(FLOPs of one image) against log N
    """

    parameters: NDArray
    bootstrap: NDArray
    noise: NDArray
    rms: float
    alone: NDArray
    reference: float
    cost: tuple[float, float]

    def size(self, compute: ArrayLike) -> NDArray:
        """Return (3, n): the best number of parameters for each compute in FLOPs, and its 95 % interval."""
        x = self._log(compute)
        best, resampled = (theta[:, 4:5] + theta[:, 5:] * x for theta in (self.parameters[None], self.bootstrap))
        return np.exp(_with_quantiles(best[0], resampled))

    def images(self, compute: ArrayLike) -> NDArray:
        """Return (3, n): the images that the best size sees with each compute, and the 95 % interval."""
        best, low, high = self.size(compute)
        per_image = [np.exp(self.cost[0] + self.cost[1] * np.log(n)) for n in (best, high, low)]
        return np.asarray(compute, float) / np.stack(per_image)

    def loss(self, compute: ArrayLike, of: str = "curve", seed: int = 0) -> NDArray:
        """Return (3, n): the loss of the best size with each compute, and its 95 % interval.

        of: "curve", or "run" for that of one new run, whose noise it holds too
        """
        x = self._log(compute)
        best, resampled = (_envelope(theta, x)[0] for theta in (self.parameters[None], self.bootstrap))
        if of == "run":
            draw = np.random.default_rng(seed).standard_normal(resampled.shape)
            resampled = resampled + draw * self.noise[:, None]
        return np.exp(_with_interval(best[0], resampled))

    def at(self, parameters: ArrayLike, compute: float) -> NDArray:
        """Return the loss (n,) of networks of these sizes with one compute."""
        sizes = np.log(np.asarray(parameters, float))
        x = np.full_like(sizes, np.log(compute / self.reference))
        return np.exp(log_loss(self.parameters[None], x, sizes)[0][0])

    def exponents(self) -> dict[str, tuple[float, float, float]]:
        """Return the exponent of N_opt, of the images and of the loss against compute, each with its 95 % interval.

        They are those of the runs alone, so that they can be compared with published ones.
        """
        size = _with_quantiles(self.alone[0, 5], self.alone[1:, 5])
        loss = _with_interval(self.alone[0, 1], self.alone[1:, 1])
        images = 1 - self.cost[1] * size[[0, 2, 1]]
        return {"parameters": tuple(size), "images": tuple(images), "loss": tuple(np.exp(loss))}

    def _log(self, compute: ArrayLike) -> NDArray:
        return np.log(np.asarray(compute, float) / self.reference)


def _with_quantiles(value: NDArray, resampled: NDArray) -> NDArray:
    """Return the value (n,), and the bootstrap's 95 % quantiles of its resamples (B, n), as (3, n)."""
    low, high = np.quantile(resampled, [0.025, 0.975], axis=0)
    return np.stack([value, low, high])


def _with_interval(value: NDArray, resampled: NDArray) -> NDArray:
    """Return the value (n,), and the 95 % interval of its resamples (B, n), as (3, n).

    On each side it is the farther one of the bootstrap's quantile and its reflection at the value. A floor cannot be
    below 0, so resamples of a law whose floor is overestimated lie to one side, and the quantile misses the truth.
    """
    value, low, high = _with_quantiles(value, resampled)
    far_low, far_high = np.minimum(low, 2 * value - high), np.maximum(high, 2 * value - low)
    return np.stack([value, far_low, far_high])


def fit_isoflop(
    parameters: ArrayLike,
    compute: ArrayLike,
    loss: ArrayLike,
    flops_per_image: ArrayLike,
    resamples: int = RESAMPLES,
    near: float = NEAR,
    exponent_spread: float = EXPONENT_SPREAD,
) -> IsoFlop | None:
    """Fit the law to runs of one backbone; None without three budgets of three sizes each.

    parameters, compute, loss, flops_per_image: (n,) of each run, at the end of its budget; seeds are runs of their own
    resamples: size of the bootstrap
    near: distance of log loss from the best one at a budget at which a run's square counts half; infinite: all alike
    exponent_spread: standard deviation of published exponents of the best size; infinite: they do not count

    The bootstrap is parametric, because nine runs leave too few residuals to resample: each resample draws the size of
    its noise from the scaled inverse chi-square distribution of its degrees of freedom, so few runs give wide
    intervals. Their coverage is tested in simulation.
    """
    size, compute, loss = (np.asarray(v, float) for v in (parameters, compute, loss))
    budgets = budgets_of(compute)
    sizes_of = [_groups(size[budgets == b], SAME_SIZE).max() + 1 for b in np.unique(budgets)]
    if sum(n >= FEWEST_SIZES for n in sizes_of) < FEWEST_BUDGETS or not (loss > 0).all():
        return None
    reference = float(np.exp(np.log(compute).mean()))
    x, y, s = np.log(compute / reference), np.log(loss), np.log(size)

    weight = root_weights(y, budgets, near)

    def solve(
        logs: NDArray, expected: NDArray, strength: float, start: NDArray, tolerance: float
    ) -> tuple[NDArray, NDArray]:
        """Fit each row of logs of losses (B, n), and of expected exponents (B,), from its start (B, 6)."""

        def residuals(theta: NDArray, rows: NDArray) -> tuple[NDArray, NDArray]:
            value, gradient = log_loss(theta, x, s)
            apart, by_exponent = strength * (theta[:, 5] - expected[rows]), np.zeros((len(theta), 1, len(NAMES)))
            by_exponent[..., 5] = strength
            return (
                np.column_stack([weight * (value - logs[rows]), apart]),
                np.concatenate([weight[:, None] * gradient, by_exponent], 1),
            )

        return levenberg_marquardt(residuals, start, LOW, HIGH, tolerance)

    freedom = len(y) - len(NAMES)
    if freedom <= 0:
        return None
    ours, published = np.stack([y, y]), np.full(2, PUBLISHED_EXPONENT)

    def fitted(start: NDArray, strength: float) -> tuple[NDArray, NDArray, NDArray, float]:
        """Return both fits (2, 6), the better one with its resamples (1 + B, 6), their noise (B,) and the rms."""
        fits, squares = solve(ours, published, strength, start, 1e-9)
        best = fits[squares.argmin()]
        value = log_loss(best[None], x, s)[0]
        rest = float(((weight * (value - y)) ** 2).sum())
        rng = np.random.default_rng(0)
        noise = np.sqrt(rest / rng.chisquare(freedom, resamples))
        logs = value + noise[:, None] / weight * rng.standard_normal((resamples, len(y)))
        expected = best[5] + (exponent_spread * rng.standard_normal(resamples) if strength else np.zeros(resamples))
        resampled, _ = solve(logs, expected, strength, np.tile(best, (resamples, 1)), 1e-6)
        return fits, np.vstack([best, resampled]), noise, float(np.sqrt(rest / freedom))

    starts = np.stack([_start(x, y, s, budgets, share) for share in (0.3, 0.8)])
    free, alone, _, rms = fitted(starts, 0.0)
    _, found, noise, rms = fitted(free, rms / exponent_spread)
    slope, intercept = np.polyfit(s, np.log(np.asarray(flops_per_image, float)), 1)
    return IsoFlop(found[0], found[1:], noise, rms, alone, reference, (float(intercept), float(slope)))


@dataclass(frozen=True)
class Parabola:
    """The runs of one budget and the law through them.

    compute: FLOPs of a run, the geometric mean
    parameters, losses: (n,) of the runs, the smallest first
    best: the law's best number of parameters, and its loss
    """

    compute: float
    parameters: NDArray
    losses: NDArray
    best: tuple[float, float]


def parabolas(ends: pd.DataFrame, law: IsoFlop) -> list[Parabola]:
    """Return the runs of each budget, the smallest first. ends: parameters, train_flops and val_loss of each run."""
    numbers = budgets_of(ends["train_flops"].to_numpy(float))
    found = []
    for number in range(numbers.max() + 1):
        own = ends[numbers == number].sort_values("parameters")
        compute = float(np.exp(np.log(own["train_flops"]).mean()))
        best = float(law.size([compute])[0, 0])
        loss = float(law.at([best], compute)[0])
        found.append(
            Parabola(compute, own["parameters"].to_numpy(float), own["val_loss"].to_numpy(float), (best, loss))
        )
    return found


def sizes_around(ends: pd.DataFrame) -> NDArray:
    """Return the numbers of parameters at which parabolas are drawn."""
    return np.geomspace(ends["parameters"].min() / 1.5, ends["parameters"].max() * 1.5, 80)


def root_weights(logs: NDArray, budgets: NDArray, near: float = NEAR) -> NDArray:
    """Return the factor (n,) of each run's residual: less, the further its log loss is above the best of its budget."""
    lowest = np.array([logs[budgets == b].min() for b in budgets])
    return 1 / np.sqrt(1 + ((logs - lowest) / near) ** 2)


def budgets_of(compute: NDArray) -> NDArray:
    """Return the number of the budget of each run, the smallest first."""
    return _groups(compute, SAME_BUDGET)


def _groups(values: NDArray, ratio: float) -> NDArray:
    """Return the number of the group of each value (n,), smallest first; neighbours in a group are within a ratio."""
    order = np.argsort(values)
    steps = np.diff(np.log(values[order]), prepend=np.log(values[order[0]])) > np.log(ratio)
    numbers = np.empty(len(values), int)
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
        [log_scale, np.log(np.clip(-slope, 0.02, 1.5)), floor, curvature, log_size, np.clip(size_exponent, 0.3, 0.8)]
    )


def _envelope(theta: NDArray, x: NDArray) -> tuple[NDArray, NDArray]:
    """Return log of the loss of the best size (B, n), and its derivatives (B, n, 6). theta: (B, 6)."""
    alpha = np.exp(theta[:, 1:2])
    falling, floor = np.exp(theta[:, :1] - alpha * x), np.exp(theta[:, 2:3])
    share = falling / (falling + floor)
    gradient = np.zeros((*share.shape, len(NAMES)))
    gradient[..., 0], gradient[..., 1], gradient[..., 2] = share, -share * alpha * x, 1 - share
    return np.log(falling + floor), gradient


def log_loss(theta: NDArray, x: NDArray, s: NDArray) -> tuple[NDArray, NDArray]:
    """Return log of the loss (B, n) of runs with log computes x and log sizes s (n,), and its derivatives (B, n, 6)."""
    value, gradient = _envelope(theta, x)
    curvature, off = np.exp(theta[:, 3:4]), s - theta[:, 4:5] - theta[:, 5:6] * x
    gradient[..., 3], gradient[..., 4], gradient[..., 5] = (
        curvature * off**2,
        -2 * curvature * off,
        -2 * curvature * off * x,
    )
    return value + curvature * off**2, gradient


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


def at_best_recipe(ends: pd.DataFrame) -> pd.DataFrame:
    """Keep of each size at each budget the recipe of the lowest mean loss: others have a worse learning rate, say."""
    cell = [ends["parameters"], budgets_of(ends["train_flops"].to_numpy(float))]
    means = ends["val_loss"].groupby([*cell, ends["recipe"]]).transform("mean")
    return ends[means == means.groupby(cell).transform("min")]


def fit_ends(ends: pd.DataFrame) -> IsoFlop | None:
    """Fit the law to the ends of one LOSS_GROUP."""
    numbers, compute, loss, per_image = (
        ends[name].to_numpy(float) for name in ("parameters", "train_flops", "val_loss", "flops_per_image")
    )
    return fit_isoflop(numbers, compute, loss, per_image)


def isoflop(rows: pd.DataFrame) -> tuple[pd.DataFrame, dict[tuple, IsoFlop]]:
    """Return a table of the laws of every LOSS_GROUP with enough runs, and the laws by group.

    The largest budget is predicted from the others, so that the error of such a prediction is known.
    """
    found, laws = [], {}
    for group, ends in ends_with_loss(rows).groupby(LOSS_GROUP, sort=True):
        ends = at_best_recipe(ends)
        law = fit_ends(ends)
        if law is None:
            continue
        laws[group] = law
        row = dict(zip(LOSS_GROUP, group, strict=True)) | {
            "runs": len(ends),
            "budgets": int(budgets_of(ends["train_flops"].to_numpy(float)).max()) + 1,
            "largest_flops": float(ends["train_flops"].max()),
            "noise_percent": 100 * law.rms,
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
