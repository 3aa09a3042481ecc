"""Expected values: closed forms for Gaussians (Dowson and Landau 1982), and torch-fidelity on the same features."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric

from diffscale.evaluation.metrics.distances import Root, frechet, frechet_of_features
from diffscale.evaluation.metrics.statistics import Moments, moments_of


def gaussian(mean, covariance) -> Moments:
    return Moments(0, np.asarray(mean, np.float64), np.asarray(covariance, np.float64))


@pytest.mark.parametrize("dim", [1, 7, 64])
def test_closed_forms_of_gaussians(dim):
    standard = gaussian(np.zeros(dim), np.eye(dim))
    assert frechet(standard, standard) == pytest.approx(0, abs=1e-12 * dim)
    assert frechet(standard, gaussian(np.ones(dim), np.eye(dim))) == pytest.approx(dim)
    assert frechet(standard, gaussian(np.zeros(dim), 4 * np.eye(dim))) == pytest.approx(dim)


def test_commuting_covariances():
    # For diagonal covariances the distance is Σ (μa−μb)² + (√a − √b)².
    a, b = np.array([1.0, 4.0, 9.0]), np.array([16.0, 1.0, 0.25])
    assert frechet(gaussian([0, 1, 2], np.diag(a)), gaussian([1, 1, 4], np.diag(b))) == pytest.approx(
        5 + np.square(np.sqrt(a) - np.sqrt(b)).sum()
    )


def correlated(n: int, dim: int, seed: int) -> np.ndarray:
    random = np.random.default_rng(seed)
    mix = random.normal(size=(dim, dim)) / np.sqrt(dim)
    return np.maximum(random.normal(size=(n, dim)) @ mix + 0.3, 0).astype(np.float32)


def test_agrees_with_torch_fidelity_to_1e6():
    x, y = correlated(900, 96, 0), correlated(700, 96, 1)
    theirs = fid_statistics_to_metric(*(fid_features_to_statistics(torch.from_numpy(f)) for f in (x, y)), False)
    ours = frechet(moments_of(x), moments_of(y))
    assert ours == pytest.approx(theirs["frechet_inception_distance"], rel=1e-6)


@pytest.mark.parametrize(("n", "m"), [(40, 400), (400, 40), (40, 30), (2, 2)])
def test_fewer_samples_than_dimensions_give_a_finite_value_that_agrees_with_torch_fidelity(n, m):
    x, y = correlated(n, 96, 0).astype(np.float64), correlated(m, 96, 1).astype(np.float64)
    ours = frechet(moments_of(x), moments_of(y))
    theirs = fid_statistics_to_metric(*(fid_features_to_statistics(torch.from_numpy(f)) for f in (x, y)), False)
    assert np.isfinite(ours)
    assert ours == pytest.approx(theirs["frechet_inception_distance"], rel=1e-5)


@settings(max_examples=30, deadline=None)
@given(n=st.integers(2, 60), m=st.integers(2, 60), seed=st.integers(0, 1000))
def test_the_small_matrix_gives_the_same_value_and_sides_do_not_matter(n, m, seed):
    x, y = correlated(n, 24, seed), correlated(m, 24, seed + 1)
    a, b = moments_of(x), moments_of(y)
    value = frechet(a, b)
    assert value >= -1e-9
    assert frechet(b, a) == pytest.approx(value, rel=1e-7, abs=1e-9)
    assert frechet_of_features(x, Root.of(b)) == pytest.approx(value, rel=1e-7, abs=1e-9)


def test_finite_sample_bias_falls_as_one_over_n():
    # Two samples of one Gaussian with d = 64: the mean distance is 4.42 at n = 500 and 0.4435 at n = 5,000.
    random = np.random.default_rng(0)

    def mean_distance(n: int, repeats: int) -> float:
        sets = [random.normal(size=(2, n, 64)) for _ in range(repeats)]
        return float(np.mean([frechet(moments_of(x), moments_of(y)) for x, y in sets]))

    assert mean_distance(500, 12) == pytest.approx(4.42, rel=0.03)
    assert mean_distance(5000, 4) == pytest.approx(0.4435, rel=0.04)


def test_float32_features_of_large_mean_do_not_cancel():
    # A one-pass float32 covariance of these would be wrong in the first digit.
    x = np.random.default_rng(0).normal(size=(5000, 8)).astype(np.float32) + np.float32(4096)
    exact = np.cov(x.astype(np.float64), rowvar=False)
    np.testing.assert_allclose(moments_of(x, rows=100).covariance, exact, rtol=1e-9, atol=1e-12)
