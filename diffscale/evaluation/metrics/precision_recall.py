"""Metrics of nearest neighbours in feature space: precision, recall, density, coverage and memorisation."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from diffscale.evaluation.metrics.device import to_metric_device
from diffscale.kernels.runtime import exact_float32

QUERIES, CORPUS = 1024, 8192


def _blocks(x: NDArray, rows: int):
    for first in range(0, len(x), rows):
        yield first, to_metric_device(np.asarray(x[first : first + rows], dtype=np.float32))


@exact_float32()
def nearest(queries: NDArray, corpus: NDArray, k: int = 1) -> tuple[NDArray, NDArray]:
    """Return the Euclidean distances (n,k), ascending, of each query to its k nearest rows of the corpus, and the rows.

    queries: (n,d). corpus: (m,d).
    """
    distances, rows = [], []
    for _, q in _blocks(queries, QUERIES):
        best_d = q.new_empty(len(q), 0)
        best_i = q.new_empty(len(q), 0, dtype=torch.long)
        for first, c in _blocks(corpus, CORPUS):
            d, i = torch.cdist(q, c).topk(min(k, len(c)), largest=False)
            best_d, best_i = torch.cat([best_d, d], 1), torch.cat([best_i, i + first], 1)
            best_d, order = best_d.topk(min(k, best_d.shape[1]), largest=False)
            best_i = best_i.gather(1, order)
        distances.append(best_d.cpu().numpy())
        rows.append(best_i.cpu().numpy())
    return np.concatenate(distances), np.concatenate(rows)


def radii(x: NDArray, k: int) -> NDArray:
    """Return the distance (n,) of each row to its k-th nearest other row."""
    return nearest(x, x, k + 1)[0][:, -1]


@dataclass(frozen=True)
class PrecisionRecall:
    """Results of `precision_recall`."""

    precision: float
    recall: float
    density: float
    coverage: float

    @property
    def f_score(self) -> float:
        """Harmonic mean of precision and recall (torch-fidelity's; 0 where both are 0)."""
        return 2 * self.precision * self.recall / max(1e-5, self.precision + self.recall)


@exact_float32()
def precision_recall(generated: NDArray, reference: NDArray, *, k: int = 3, k_density: int = 5) -> PrecisionRecall:
    """Return precision and recall (Kynkäänniemi et al. 2019; k = 3), density and coverage (Naeem et al. 2020; k = 5).

    Precision: share of *generated* samples inside the ball of any reference image; recall: share of *reference*
    images inside the ball of any generated sample. A ball reaches to the k-th nearest of the same set.
    Raises ValueError when a set has no more than k_density samples.
    """
    if min(len(generated), len(reference)) <= k_density:
        raise ValueError(f"precision and recall need more than {k_density} samples on each side")
    ball, ball_density = radii(reference, k), radii(reference, k_density)
    own_ball = radii(generated, k)
    inside, recalled, covered = (
        to_metric_device(np.zeros(n, bool)) for n in (len(generated), len(reference), len(reference))
    )
    count = 0
    for g, x in _blocks(generated, QUERIES):
        for r, y in _blocks(reference, CORPUS):
            d = torch.cdist(x, y)
            inside[g : g + len(x)] |= (d <= _rows(ball, r, y)).any(1)
            recalled[r : r + len(y)] |= (d <= _rows(own_ball, g, x)[:, None]).any(0)
            dense = d <= _rows(ball_density, r, y)
            covered[r : r + len(y)] |= dense.any(0)
            count += int(dense.sum())
    return PrecisionRecall(
        precision=inside.double().mean().item(),
        recall=recalled.double().mean().item(),
        density=count / (k_density * len(generated)),
        coverage=covered.double().mean().item(),
    )


def _rows(values: NDArray, first: int, block: Tensor) -> Tensor:
    return to_metric_device(values[first : first + len(block)])


USUAL = 0.01


def usual_distance(training: NDArray, others: NDArray | None) -> float:
    """Return the distance to a training image below which only 1 % of unseen images lie.

    training: features (n,d) of the training images.
    others: features (m,d) of held-out images. None, or fewer than 100, compares each training image with the rest of
        its set, without exact duplicates (up to three).
    """
    if others is not None and len(others) >= 100:
        distances = nearest(others, training)[0][:, 0]
    else:
        several = nearest(training, training, 5)[0]
        # Rounding in torch.cdist gives an image a distance to its own copy of about 1e-3 of the usual.
        distinct = several > 1e-2 * np.median(several[:, -1])
        distances = several[np.arange(len(several)), distinct.argmax(axis=1)][distinct.any(axis=1)]
    return float(np.quantile(distances, USUAL)) if len(distances) else 0.0


def memorisation(generated: NDArray, training: NDArray, usual: float) -> float:
    """Return the share of generated samples nearer to a training image than `usual`.

    It is about 0.01 for samples that are as far from the training set as unseen images are; 1 for copies.
    """
    return float((nearest(generated, training)[0][:, 0] < usual).mean())
