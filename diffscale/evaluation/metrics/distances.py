"""Distances between two sets of features: Fréchet and kernel, and the Inception Score of one.

Which set is generated never matters for the Fréchet distance; everywhere else `generated` comes first.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from diffscale.evaluation.feature_store import select_rows
from diffscale.evaluation.metrics.device import to_metric_device
from diffscale.evaluation.metrics.statistics import Float64, Moments, moments_of

NEGATIVE = 1e-3
"""Share of the largest eigenvalue below which a negative one of a covariance counts as rounding."""


@dataclass(frozen=True)
class Root:
    """A reference's mean and the symmetric square root of its covariance, computed once.

    mean: (d,).
    root: (d,d).
    trace: of the covariance.
    rank: the largest rank that the covariance can have. Only this many eigenvalues are used: the others are rounding,
        and the sum of a thousand square roots of 1e-14 is not negligible.
    """

    mean: Float64
    root: Float64
    trace: float
    rank: int

    @classmethod
    def of(cls, reference: Moments) -> Root:
        """Return the root of a reference. Raises ValueError if its covariance has an eigenvalue well below 0."""
        rank = _rank(reference)
        values, vectors = torch.linalg.eigh(to_metric_device(reference.covariance))
        if values[0] < -NEGATIVE * values[-1].clamp(min=0):
            raise ValueError(f"the covariance has the eigenvalue {float(values[0]):.3g}, and none is negative")
        values, vectors = values[-rank:].clamp(min=0), vectors[:, -rank:]
        root = (vectors * values.sqrt()) @ vectors.T
        return cls(reference.mean, root.cpu().numpy(), float(np.trace(reference.covariance)), rank)


def _rank(moments: Moments) -> int:
    return max(min(moments.n - 1, moments.dim), 1) if moments.n else moments.dim


def frechet(a: Moments, b: Moments | Root) -> float:
    """Return ‖μa−μb‖² + tr(Σa + Σb − 2(ΣaΣb)^½) (Dowson and Landau 1982; Heusel et al. 2017) in float64.

    The trace of the root is the sum of the square roots of the eigenvalues of Σb^½ Σa Σb^½, which is symmetric:
    rounding cannot make the result complex or NaN, whatever the ranks. `b` may be a `Root` computed before.
    """
    root = b if isinstance(b, Root) else Root.of(b)
    difference = a.mean - root.mean
    square_root = to_metric_device(root.root)
    cross = _sum_of_roots(square_root @ to_metric_device(a.covariance) @ square_root, min(root.rank, _rank(a)))
    return float(difference @ difference + np.trace(a.covariance) + root.trace - 2 * cross)


def _sum_of_roots(matrix: Tensor, rank: int) -> float:
    """Return Σ √λ over the `rank` largest eigenvalues of a symmetric matrix (d,d) of float64.

    torch's LAPACK is MKL, 1.3 times (here) to 2.7 times (with vectors, above) as fast as numpy's OpenBLAS at d = 2048.
    """
    values = torch.linalg.eigvalsh((matrix + matrix.T) / 2)[-rank:]
    return float(values.clamp(min=0).sqrt().sum())


def frechet_of_features(features: NDArray, reference: Root) -> float:
    """Return the Fréchet distance of features (n,d).

    With n ≤ d the eigenvalues come from an (n,n) matrix, which is much cheaper.
    """
    n, dim = features.shape
    if n > dim:
        return frechet(moments_of(features), reference)
    x = np.asarray(features[:], dtype=np.float64)
    difference = x.mean(axis=0) - reference.mean
    centred = (x - x.mean(axis=0)) / np.sqrt(max(n - 1, 1))
    half = to_metric_device(centred) @ to_metric_device(reference.root)
    cross = _sum_of_roots(half @ half.T, min(reference.rank, max(n - 1, 1)))
    return float(difference @ difference + np.square(centred).sum() + reference.trace - 2 * cross)


def kernel_distance(
    generated: NDArray, reference: NDArray, *, subsets: int = 100, subset_size: int = 1000, seed: int = 2020
) -> tuple[float, float]:
    """Return the KID: mean and standard deviation over subsets of the unbiased MMD² with the kernel (xᵀy/d + 1)³.

    Binkowski et al. 2018; subsets are drawn as torch-fidelity draws them (numpy's RandomState(2020)), so that
    the values agree.

    generated, reference: features (n,d).
    subset_size: lowered to the size of the smaller set.
    """
    random = np.random.RandomState(seed)
    size = min(subset_size, len(generated), len(reference))
    values = np.empty(subsets)
    for i in range(subsets):
        x = np.asarray(generated[random.choice(len(generated), size, replace=False)], np.float64)
        y = np.asarray(reference[random.choice(len(reference), size, replace=False)], np.float64)
        values[i] = _mmd2(to_metric_device(x), to_metric_device(y))
    return float(values.mean()), float(values.std())


def _mmd2(x: Tensor, y: Tensor) -> float:
    n, dim = x.shape

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return (a @ b.T / dim + 1) ** 3

    xx, yy, xy = kernel(x, x), kernel(y, y), kernel(x, y)
    within = (xx.sum() - xx.trace() + yy.sum() - yy.trace()) / (n * (n - 1))
    return float(within - 2 * xy.mean())


def inception_score(logits: NDArray, splits: int = 10, seed: int = 2020) -> tuple[float, float]:
    """Return the mean and standard deviation over splits of exp E KL(p(y|x) ‖ p(y)) (Salimans et al. 2016).

    The samples are split in a random order, that of torch-fidelity, so that the values agree.

    logits: (n, classes), without bias.
    """
    n = len(logits)
    order = np.random.RandomState(seed).permutation(n)
    scores = [_score(select_rows(logits, order[i * n // splits : (i + 1) * n // splits])) for i in range(splits)]
    return float(np.mean(scores)), float(np.std(scores))


def _score(logits: NDArray, rows: int = 4096) -> float:
    """Return exp of the mean negative entropy of p(y|x) less that of the mean p(y), read `rows` at a time."""
    negative_entropy, marginal = 0.0, np.zeros(logits.shape[1])
    for first in range(0, len(logits), rows):
        x = np.asarray(logits[first : first + rows], np.float64)
        x = x - x.max(axis=1, keepdims=True)
        log_p = x - np.log(np.exp(x).sum(axis=1, keepdims=True))
        p = np.exp(log_p)
        negative_entropy += float((p * log_p).sum())
        marginal += p.sum(axis=0)
    marginal /= len(logits)
    seen = marginal[marginal > 0]
    return float(np.exp(negative_entropy / len(logits) - (seen * np.log(seen)).sum()))
