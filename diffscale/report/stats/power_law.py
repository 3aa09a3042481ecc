"""Least-squares fits of y(C) = floor + (C / C0)^-b · scale to a Fréchet distance against compute, many at a time.

The three parameters are fitted to log y, because the noise of a Fréchet distance is relative.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from diffscale.report.stats.least_squares import levenberg_marquardt

EXPONENTS = (0.01, 5.0)
FREE_FLOOR_FROM = 4
FEWEST_POINTS = 3


@dataclass(frozen=True)
class PowerLaw:
    """B fitted laws. floor, scale, exponent: (B,) float64. reference: C0 in the unit of the compute."""

    floor: np.ndarray
    scale: np.ndarray
    exponent: np.ndarray
    reference: float

    def __call__(self, compute: np.ndarray) -> np.ndarray:
        """Predict values (B, len(compute))."""
        x = np.log(np.asarray(compute, dtype=float) / self.reference)
        return self.floor[:, None] + self.scale[:, None] * np.exp(-self.exponent[:, None] * x[None, :])

    def parameters(self) -> int:
        return 2 if not self.floor.any() else 3


@dataclass(frozen=True)
class Fit:
    """The law through the points, its bootstrap, and the noise of one new measurement.

    noise: (B,) standard deviation of log y in each resample.
    rms: standard deviation of the residuals of log y.
    """

    law: PowerLaw
    bootstrap: PowerLaw
    noise: np.ndarray
    rms: float
    points: int

    def interval(self, compute: np.ndarray, of: str = "curve", seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
        """Return 95 % bounds (len(compute),) of the curve, or with of='measurement' of one new value."""
        values = self.bootstrap(compute)
        if of == "measurement":
            draw = np.random.default_rng(seed).standard_normal(values.shape)
            values = values * np.exp(np.clip(draw * self.noise[:, None], -20, 20))
        low, high = np.quantile(values, [0.025, 0.975], axis=0)
        return low, high


def solve(compute: np.ndarray, values: np.ndarray, free_floor: bool = True) -> PowerLaw:
    """Fit B curves at once, each from the best of three starts (floor near 0, half or nearly all of the lowest value).

    compute: (n,) positive, n at least the number of parameters.
    values: (B, n) positive.
    free_floor: fit the floor; otherwise it is 0.
    """
    reference = float(np.exp(np.mean(np.log(compute))))
    x, y = np.log(compute / reference), np.log(values)
    lowest = y.min(axis=1)
    slope = np.clip(-np.polyfit(x, y.T, 1)[0], *EXPONENTS)
    best_theta, best_loss = np.empty((len(y), 3)), np.full(len(y), np.inf)
    for share in (1e-3, 0.5, 0.9) if free_floor else (0.0,):
        floor = lowest + np.log(share) if share else np.full_like(lowest, -np.inf)
        theta = np.stack([np.log(np.mean(np.exp(y) - np.exp(floor)[:, None], axis=1)), np.log(slope), floor], axis=1)
        theta, loss = _fit_logs(theta, x, y, free_floor)
        better = loss < best_loss
        best_theta[better], best_loss[better] = theta[better], loss[better]
    return PowerLaw(np.exp(best_theta[:, 2]), np.exp(best_theta[:, 0]), np.exp(best_theta[:, 1]), reference)


def fit(
    compute: np.ndarray,
    values: np.ndarray,
    spread: float = np.nan,
    df: float = 0,
    *,
    resamples: int = 400,
    seed: int = 0,
) -> Fit | None:
    """Fit one curve with a parametric bootstrap; None if there are fewer than three different compute points.

    compute, values: (n,).
    spread: standard deviation of log y between replicates, with `df` degrees of freedom; df = inf makes it a lower
        bound, the noise of the evaluation.
    resamples: size of the bootstrap.

    The noise of log y is estimated from the residuals and the replicates. Each resample draws its noise's size from
    the scaled inverse chi-square distribution of their degrees of freedom, so few points give wide intervals
    (Gelman et al., Bayesian Data Analysis, section 3.2). The floor is free from four points on, and 0 at three.
    Points are assumed to err independently.
    """
    order = np.argsort(compute)
    compute, values = np.asarray(compute, float)[order], np.asarray(values, float)[order]
    if len(np.unique(compute)) < FEWEST_POINTS or not (values > 0).all():
        return None
    free = len(np.unique(compute)) >= FREE_FLOOR_FROM
    law = solve(compute, values[None], free)
    fitted = np.log(law(compute)[0])
    squares = float(((np.log(values) - fitted) ** 2).sum())
    freedom = float(len(values) - (3 if free else 2))
    if np.isfinite(spread) and np.isfinite(df):
        squares, freedom = squares + df * spread**2, freedom + df
    rng = np.random.default_rng(seed)
    noise = np.sqrt(squares / rng.chisquare(freedom, resamples))
    if np.isfinite(spread) and np.isinf(df):
        noise = np.maximum(noise, spread)
    noise = np.clip(noise, 1e-9, 3.0)
    resampled = fitted[None] + noise[:, None] * rng.standard_normal((resamples, len(values)))
    rms = float(np.sqrt(np.mean((np.log(values) - fitted) ** 2)))
    return Fit(law, solve(compute, np.exp(resampled), free), noise, rms, len(values))


def _fit_logs(theta: np.ndarray, x: np.ndarray, y: np.ndarray, free_floor: bool) -> tuple[np.ndarray, np.ndarray]:
    """Return theta (B, 3) and squared residuals. theta: log scale, log exponent, log floor; x (n,), y (B, n): logs."""
    low = np.stack([y.min(1) - 30, np.full(len(y), np.log(EXPONENTS[0])), y.min(1) - 7], axis=1)
    high = np.stack([y.max(1) + 30, np.full(len(y), np.log(EXPONENTS[1])), y.min(1) + 1], axis=1)
    if not free_floor:
        low[:, 2] = high[:, 2] = -np.inf
    return levenberg_marquardt(lambda theta, rows: _residual(theta, x, y[rows]), theta, low, high)


def _residual(theta: np.ndarray, x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return log f - y (B, n) and its derivatives (B, n, 3) by log scale, log exponent and log floor."""
    exponent = np.exp(theta[:, 1:2])
    falling, floor = np.exp(theta[:, :1] - exponent * x[None]), np.exp(theta[:, 2:])
    total = falling + floor
    share = falling / total
    return np.log(total) - y, np.stack([share, -share * exponent * x[None], 1 - share], axis=2)
