"""Which pair a rater sees next: the one that teaches most, an earlier one again, or an attention check."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from diffscale.core.hashing import sha256_of
from diffscale.preference.strengths import covariance, outcomes
from diffscale.preference.votes import Row, as_votes

NOISE = -1
"""The contender of an attention check that is random pixels."""
LEAST_SEEN = 3
"""Votes on every contender before the choice follows the fit."""
CHECK_EVERY, REPEAT_EVERY = 20, 10
"""One question of so many is an attention check, or a pair that the rater has seen, with sides exchanged."""


@dataclass(frozen=True)
class Ask:
    """What a rater is shown.

    left, right: contenders, NOISE for random pixels
    item: position of the images in every contender
    """

    left: int
    right: int
    item: int
    kind: Literal["pair", "repeat", "check"] = "pair"


def next_ask(
    contenders: int, items: int, votes: dict[str, list[Row]], rater: str, honest: int = 0, seed: int = 0
) -> Ask:
    """Return the question after the rater's last answer.

    It is a function of the votes until that answer, so neither a crash nor another rater's votes change it.

    contenders, items: numbers of them
    votes: rows of all raters by name
    honest: the contender that an attention check sets against noise: real images where there are any
    """
    own = votes.get(rater, [])
    number = len(own)
    rng = np.random.default_rng([seed, int(sha256_of(rater)[:12], 16), number])
    pairs = [row for row in own if row.kind == "pair"]
    if number % CHECK_EVERY == CHECK_EVERY // 2:
        left, right = (honest, NOISE) if rng.random() < 0.5 else (NOISE, honest)
        return Ask(left, right, int(rng.integers(items)), "check")
    if number % REPEAT_EVERY == REPEAT_EVERY // 2 and pairs:
        seen = pairs[int(rng.integers(len(pairs)))]
        return Ask(seen.right, seen.left, seen.item, "repeat")
    until = own[-1].time if own else 0.0
    known = as_votes({name: [row for row in rows if row.time <= until] for name, rows in votes.items()})
    pair = choose_pair(outcomes(known, contenders), contenders, rng)
    shown = Counter(row.item for row in own if {row.left, row.right} == set(pair))
    item = min(rng.permutation(items), key=lambda i: shown[int(i)])
    left, right = pair if rng.random() < 0.5 else pair[::-1]
    return Ask(left, right, int(item))


def choose_pair(counts: NDArray, contenders: int, rng: np.random.Generator) -> tuple[int, int]:
    """Return the pair of contenders whose next vote narrows the order of neighbours most.

    By the normal approximation of the fit (`covariance`) one vote on pair p lowers the variance of a difference c by
    I (c S x)² / (1 + I x S x), with I the pair's information and S the covariance. The sum over neighbours is weighted
    by their variances cubed, so that the least certain order comes first.

    counts: (pairs, 3), see `outcomes`
    """
    first, second = np.triu_indices(contenders, 1)
    total = counts.sum(1)
    seen = np.array([total[(first == k) | (second == k)].sum() for k in range(contenders)])
    if seen.min() < LEAST_SEEN:
        of_it = np.flatnonzero((first == seen.argmin()) | (second == seen.argmin()))
        best = of_it[np.argmin(total[of_it] + 0.5 * rng.random(len(of_it)))]
    else:
        theta, spread, information = covariance(counts, contenders)
        order = np.argsort(-theta)
        neighbours = np.eye(contenders)[order[:-1]] - np.eye(contenders)[order[1:]]
        pairs = np.eye(contenders)[first] - np.eye(contenders)[second]
        moved = neighbours @ spread @ pairs.T
        variance = np.einsum("ki,ij,kj->k", neighbours, spread, neighbours)
        room = 1 + information * np.einsum("pi,ij,pj->p", pairs, spread, pairs)
        best = np.argmax(information * (variance[:, None] ** 3 * moved**2).sum(0) / room)
    return int(first[best]), int(second[best])


def fixed_asks(contenders: int, items: int, count: int, honest: int = 0, seed: int = 0) -> list[Ask]:
    """Return the questions of a page without a server: every pair equally often, with repeats and checks."""
    rng = np.random.default_rng(seed)
    first, second = np.triu_indices(contenders, 1)
    asks: list[Ask] = []
    order: list[int] = []
    for number in range(count):
        pairs = [ask for ask in asks if ask.kind == "pair"]
        if number % CHECK_EVERY == CHECK_EVERY // 2:
            sides = (honest, NOISE) if rng.random() < 0.5 else (NOISE, honest)
            asks.append(Ask(*sides, int(rng.integers(items)), "check"))
        elif number % REPEAT_EVERY == REPEAT_EVERY // 2 and pairs:
            seen = pairs[int(rng.integers(len(pairs)))]
            asks.append(Ask(seen.right, seen.left, seen.item, "repeat"))
        else:
            order = order or [int(i) for i in rng.permutation(len(first))]
            pair = order.pop()
            sides = (int(first[pair]), int(second[pair]))
            asks.append(Ask(*(sides if rng.random() < 0.5 else sides[::-1]), int(rng.integers(items))))
    return asks
