"""Coverage is measured on simulated Gaussians, where the expected distance is known by averaging many draws."""

from __future__ import annotations

import numpy as np
import pytest

from diffscale.evaluation.metrics.distances import Root, frechet_of_features
from diffscale.evaluation.metrics.intervals import frechet_at_infinity, frechet_interval
from diffscale.evaluation.metrics.statistics import Moments

DIM = 32
SPECTRUM = np.exp(-np.arange(DIM) / 8)
REFERENCE = Root.of(Moments(0, np.zeros(DIM), np.diag(SPECTRUM)))


def draw(random: np.random.Generator, n: int) -> np.ndarray:
    return (random.normal(size=(n, DIM)) * 1.15 + 0.1) * np.sqrt(SPECTRUM)


def true_distance() -> float:
    return float((SPECTRUM * (0.1**2 + 0.15**2)).sum())


@pytest.mark.parametrize("n", [24, 32, 100, 1000])
def test_the_interval_covers_the_expected_distance_at_this_n(n):
    random = np.random.default_rng(0)
    made = np.array([frechet_interval(draw(random, n), REFERENCE) for _ in range(200)])
    value, low, high = made.T
    if n < 32:  # too few for sixteen groups of two
        assert np.isnan(low).all()
        return
    expected = value.mean()
    coverage = ((low <= expected) & (expected <= high)).mean()
    # Binomial error at 200 draws is 1.5 %; the jackknife is known to be conservative, so only the lower side is tight.
    assert 0.92 <= coverage <= 1.0
    assert (high - low).mean() < 1.5 * 2 * 1.96 * value.std()


def test_a_naive_bootstrap_would_be_biased_up_and_the_jackknife_is_not():
    random = np.random.default_rng(1)
    x = draw(random, 200)
    value, low, high = frechet_interval(x, REFERENCE)
    bootstrap = [frechet_of_features(x[random.integers(0, 200, 200)], REFERENCE) for _ in range(50)]
    assert np.mean(bootstrap) > high
    assert low < value < high
    assert value == pytest.approx(frechet_of_features(x, REFERENCE))


def test_the_value_at_infinity_is_nearer_to_the_truth():
    random = np.random.default_rng(0)
    plain, extrapolated = [], []
    for _ in range(10):
        x = draw(random, 1000)
        plain.append(frechet_of_features(x, REFERENCE))
        extrapolated.append(frechet_at_infinity(x, REFERENCE)[0])
    assert np.mean(plain) - true_distance() > 5 * abs(np.mean(extrapolated) - true_distance())
    with pytest.raises(ValueError, match="at least"):
        frechet_at_infinity(draw(random, 20), REFERENCE)
