"""Lanes: contiguous parts of a dataset that take turns, so that a worker reads its own lanes and no others.

Position p belongs to lane p mod L. Where L = b0·b1·... with the largest prime factor first, lane d0 + d1·b0 + ... owns
the part of the rows whose number has these digits in reverse. So the lanes of one worker, p mod W = c, are neighbours
in the data for every number of workers W = b0·b1·..., and neighbouring positions are far apart.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from diffscale.core.errors import UserError

Int64 = NDArray[np.int64]


@lru_cache(maxsize=8)
def parts_of_lanes(lanes: int) -> Int64:
    """Return the part of the data that each lane owns, a permutation that reverses mixed-radix digits."""
    parts = np.zeros(lanes, np.int64)
    left, below = np.arange(lanes), lanes
    for factor in _prime_factors(lanes):
        below //= factor
        parts += left % factor * below
        left //= factor
    parts.setflags(write=False)
    return parts


@lru_cache(maxsize=8)
def lane_starts(n: int, lanes: int, epoch: int) -> Int64:
    """Return the first row of each part of the data in an epoch, and n: int64 (lanes + 1,).

    A lane has as many rows as the epoch's n positions have places for it, so every row comes once in an epoch although
    `lanes` need not divide n. Boundaries move by a few rows between epochs.
    """
    least, more = divmod(n, lanes)
    sizes = np.full(lanes, least, np.int64)
    longer = (epoch * n + np.arange(more)) % lanes  # lanes of the positions after the last whole round
    sizes[parts_of_lanes(lanes)[longer]] += 1
    starts = np.concatenate([[0], np.cumsum(sizes)])
    starts.setflags(write=False)
    return starts


def lane_share(global_batch: int, rank: int, workers: int, lanes: int) -> range:
    """Return the places of a worker in each global batch: those of the lanes that it owns.

    Neighbouring ranks, which share a node, own neighbouring parts of the data. Raises UserError for a number of workers
    that does not divide the lanes and the batch.
    """
    check_workers(global_batch, workers, lanes)
    classes = np.argsort(parts_of_lanes(lanes)[:workers])
    return range(int(classes[rank]), global_batch, workers)


def check_workers(global_batch: int, workers: int, lanes: int) -> None:
    """Raise UserError, with the numbers that work, for workers that cannot take whole lanes in equal shares."""
    common = math.gcd(lanes, global_batch)
    if common % workers:
        counts = [count for count in range(1, common + 1) if common % count == 0]
        raise UserError(
            setting="train.workers",
            value=workers,
            expected="with data.order=lanes one of " + ", ".join(map(str, counts)),
            reason=f"workers take whole lanes: their number divides data.lanes = {lanes} and "
            f"train.global_batch = {global_batch}",
            fix="another number of workers, data.lanes with this factor, or data.order=blocks",
        )


def _prime_factors(number: int) -> list[int]:
    """Return the prime factors of a number, the largest first."""
    factors, divisor = [], 2
    while number > 1:
        while number % divisor == 0:
            factors.append(divisor)
            number //= divisor
        divisor += 1
    return factors[::-1]
