"""The Fréchet distance of 2048-d statistics against scipy.linalg.sqrtm: `python -m benchmarks.throughput.frechet`."""

from __future__ import annotations

from typing import Annotated

import numpy as np
import torch
import typer
from scipy import linalg

from benchmarks.common.measure import race, write
from diffscale.evaluation.metrics.distances import frechet
from diffscale.evaluation.metrics.statistics import Moments


def statistics(dim: int, seed: int) -> Moments:
    """Full-rank moments with a spectrum that falls like that of Inception features."""
    random = np.random.default_rng(seed)
    mix = random.normal(size=(dim, dim)) * np.exp(-np.arange(dim) / (dim / 8))
    covariance = mix @ mix.T / dim + 1e-5 * np.eye(dim)
    return Moments(0, random.normal(size=dim) * 0.1, covariance)


def by_sqrtm(a: Moments, b: Moments) -> float:
    """Compute the distance as pytorch-fid does."""
    difference = a.mean - b.mean
    root = linalg.sqrtm(a.covariance @ b.covariance)
    cross = np.trace(root.real)
    return float(difference @ difference + np.trace(a.covariance) + np.trace(b.covariance) - 2 * cross)


def main(
    dim: Annotated[int, typer.Option(help="feature dimensions")] = 2048,
    pairs: Annotated[int, typer.Option(help="alternating pairs")] = 15,
) -> None:
    torch.set_num_threads(2)
    a, b = statistics(dim, 0), statistics(dim, 1)
    ours, theirs = frechet(a, b), by_sqrtm(a, b)
    row = {"dim": dim, "ours": ours, "theirs": theirs, "relative_difference": abs(ours - theirs) / theirs}
    row |= race(lambda: frechet(a, b), lambda: by_sqrtm(a, b), 1, pairs, "frechet")
    print(row, write("frechet", [row]))


if __name__ == "__main__":
    typer.run(main)
