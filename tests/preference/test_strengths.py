"""Strengths and their intervals on simulated raters whose true strengths are known, and the choice of pairs."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from diffscale.preference.pairs import choose_pair
from diffscale.preference.strengths import Vote, covariance, fit, outcomes

TIE = 0.7


def answer(rng: np.random.Generator, difference: float) -> int:
    """One answer of Davidson's model."""
    chances = np.array([np.exp(difference / 2), TIE, np.exp(-difference / 2)])
    return int(rng.choice([1, 0, -1], p=chances / chances.sum()))


def simulated(rng: np.random.Generator, theta: np.ndarray, votes: int, raters: int) -> list[Vote]:
    pairs = list(itertools.permutations(range(len(theta)), 2))
    drawn = [pairs[int(i)] for i in rng.integers(len(pairs), size=votes)]
    return [Vote(a, b, answer(rng, theta[a] - theta[b]), str(i % raters), i) for i, (a, b) in enumerate(drawn)]


def test_many_votes_give_the_true_strengths_and_ties() -> None:
    theta = np.array([-1.0, -0.5, 0.0, 1.5])
    found = fit(simulated(np.random.default_rng(0), theta, 20_000, 4), 4, draws=50)
    np.testing.assert_allclose(found.theta, theta, atol=0.08)
    assert found.tie == pytest.approx(TIE, rel=0.05)


def test_sides_do_not_matter() -> None:
    votes = simulated(np.random.default_rng(1), np.array([0.0, 1.0, 2.0]), 60, 2)
    turned = [Vote(v.right, v.left, -v.answer, v.rater, v.item) for v in votes]
    np.testing.assert_array_equal(outcomes(votes, 3), outcomes(turned, 3))


def test_equal_contenders_are_not_preferred_and_a_clear_winner_is() -> None:
    even = [Vote(0, 1, 1 - 2 * (i % 2)) for i in range(40)]
    assert fit(even, 2).theta == pytest.approx([0, 0], abs=1e-9)
    assert not fit(even, 2).prefers(0, 1)
    won = fit([Vote(0, 1, 1) for _ in range(20)], 2)
    assert won.prefers(0, 1)
    assert np.isfinite(won.theta).all()
    assert won.win_share()[0] > 0.9


def test_no_votes_say_nothing() -> None:
    none = fit([], 3)
    assert none.theta == pytest.approx([0, 0, 0])
    assert none.win_share() == pytest.approx([0.5] * 3)


@pytest.mark.parametrize(("contenders", "votes", "raters"), [(5, 200, 2), (6, 300, 10)])
def test_intervals_cover_93_to_97_percent(contenders: int, votes: int, raters: int) -> None:
    """200 simulations with strengths drawn anew; 10 raters are drawn whole, 2 are not."""
    inside = []
    for seed in range(200):
        rng = np.random.default_rng(seed)
        theta = rng.normal(0, 1, contenders)
        found = fit(simulated(rng, theta, votes, raters), contenders, draws=200, seed=seed)
        for a, b in itertools.combinations(range(contenders), 2):
            _, low, high = found.difference(a, b)
            inside.append(low <= theta[a] - theta[b] <= high)
    assert 0.93 <= np.mean(inside) <= 0.97


def votes_needed(seed: int, active: bool, contenders: int = 8, spread: float = 2.0, width: float = 0.6) -> int:
    """Votes until the widest standard error of a difference between neighbours is `width`."""
    rng = np.random.default_rng(seed)
    theta = rng.normal(0, spread, contenders)
    order = np.argsort(-theta)
    neighbours = np.eye(contenders)[order[:-1]] - np.eye(contenders)[order[1:]]
    first, second = np.triu_indices(contenders, 1)
    counts = np.zeros((len(first), 3))
    for votes in range(3000):
        if votes and votes % 5 == 0:
            _, spread_of, _ = covariance(counts, contenders)
            if np.sqrt(np.einsum("ki,ij,kj->k", neighbours, spread_of, neighbours)).max() <= width:
                return votes
        random = int(rng.integers(len(first)))
        a, b = choose_pair(counts, contenders, rng) if active else (first[random], second[random])
        pair = int(np.flatnonzero((first == a) & (second == b))[0])
        counts[pair, {1: 0, -1: 1, 0: 2}[answer(rng, theta[a] - theta[b])]] += 1
    return 3000


def test_chosen_pairs_need_at_most_0_7_of_the_votes_of_random_ones() -> None:
    ratios = [votes_needed(seed, True) / votes_needed(seed, False) for seed in range(6)]
    assert np.mean(ratios) <= 0.7
