"""Mean and covariance in float64, accumulated in batches and merged in any order."""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

from diffscale.core.errors import UserError
from diffscale.evaluation.metrics.device import to_metric_device

Float64 = NDArray[np.float64]
#: What reading a damaged .npz or image raises. RuntimeError: encrypted; NotImplementedError: unknown compression.
UNREADABLE = (
    OSError,
    ValueError,
    KeyError,
    TypeError,
    EOFError,
    BadZipFile,
    zlib.error,
    struct.error,
    RuntimeError,
    NotImplementedError,
)


@dataclass
class Moments:
    """Mean and scatter of n samples, float64.

    mean: (d,).
    scatter: (d,d) = Σ (x−mean)(x−mean)ᵀ.

    Merging is Chan's update, which never subtracts large sums: the order changes the result by less than 1e-9.
    """

    n: int
    mean: Float64
    scatter: Float64

    @classmethod
    def empty(cls, dim: int) -> Moments:
        return cls(0, np.zeros(dim), np.zeros((dim, dim)))

    @classmethod
    def of(cls, features: NDArray) -> Moments:
        """Return the moments of features (n,d) of any float type."""
        if len(features) == 0:
            return cls.empty(features.shape[1])
        x = to_metric_device(features).double()
        mean = x.mean(dim=0)
        centred = x - mean
        return cls(len(x), mean.cpu().numpy(), (centred.T @ centred).cpu().numpy())

    def merge(self, other: Moments) -> Moments:
        """Return the moments of both sets of samples together."""
        if not self.n or not other.n:
            return other if other.n else self
        n = self.n + other.n
        delta = other.mean - self.mean
        scatter = self.scatter + other.scatter + np.outer(delta, delta) * (self.n * other.n / n)
        return Moments(n, self.mean + delta * (other.n / n), scatter)

    def without(self, part: Moments) -> Moments:
        """Return the moments of the samples that are not in `part`, which must be a subset (for the jackknife)."""
        n = self.n - part.n
        mean = (self.mean * self.n - part.mean * part.n) / n
        delta = part.mean - mean
        scatter = self.scatter - part.scatter - np.outer(delta, delta) * (part.n * n / self.n)
        return Moments(n, mean, scatter)

    @property
    def dim(self) -> int:
        return len(self.mean)

    @property
    def covariance(self) -> Float64:
        """Unbiased (d,d), as numpy.cov; zero for fewer than two samples."""
        return self.scatter / max(self.n - 1, 1)


def moments_of(features: NDArray, rows: int = 4096) -> Moments:
    """Return the moments of features (n,d), read `rows` at a time in the same blocks whatever holds them."""
    total = Moments.empty(features.shape[1])
    for first in range(0, len(features), rows):
        total = total.merge(Moments.of(features[first : first + rows]))
    return total


def save_moments(path: Path, moments: Moments) -> None:
    """Write an .npz with `mu` and `sigma` under the names of ADM's and EDM's files, and `n`."""
    with open(path, "wb") as file:
        np.savez(file, mu=moments.mean, sigma=moments.covariance, n=np.int64(moments.n))


def load_moments(path: Path, spatial: bool = False) -> Moments:
    """Read statistics from an .npz of diffscale, ADM or EDM: `mu` and `sigma`, for sFID ADM's `mu_s` and `sigma_s`.

    A file without the number of samples gets n = 0, which a record shows as unknown.
    Raises UserError if the file is not an .npz of statistics or its numbers cannot be a mean and a covariance; nothing
    in it is unpickled.
    """
    names = ("mu_s", "sigma_s") if spatial else ("mu", "sigma")
    try:
        with np.load(path, allow_pickle=False) as file:
            mean, sigma = (np.asarray(file[name], dtype=np.float64) for name in names)
            n = int(file["n"]) if "n" in file else 0
    except (*UNREADABLE, OverflowError) as error:
        raise UserError(
            setting="reference",
            value=str(path),
            expected=f"an .npz with {names[0]} and {names[1]}",
            reason=type(error).__name__,
        ) from None
    if reason := _broken(mean, sigma, n):
        expected = f"{names[0]} (d,), the mean, and {names[1]} (d,d), the covariance, of at least two images"
        raise UserError(setting="reference", value=str(path), expected=expected, reason=reason)
    return Moments(n, mean, sigma * max(n - 1, 1))


def _broken(mean: Float64, sigma: Float64, n: int) -> str:
    """Return why the numbers cannot be statistics of n images (0: unknown), or an empty text."""
    if mean.ndim != 1 or not len(mean) or sigma.shape != (len(mean), len(mean)):
        return f"their shapes are {mean.shape} and {sigma.shape}"
    if not np.isfinite(mean).all() or not np.isfinite(sigma).all():
        return "they hold nan or infinity"
    if n < 0 or n == 1:
        return f"n is {n}"
    scale = float(np.abs(sigma).max())
    if not np.allclose(sigma, sigma.T, rtol=0, atol=1e-4 * scale):
        return "the covariance is not symmetric"
    if float(np.diagonal(sigma).min()) < -1e-4 * scale:
        return "a variance is negative"
    return ""
