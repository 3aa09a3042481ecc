from __future__ import annotations

import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diffscale.core.errors import UserError
from diffscale.evaluation.metrics.distances import frechet
from diffscale.evaluation.metrics.statistics import Moments, load_moments, moments_of, save_moments


@settings(max_examples=40, deadline=None)
@given(cuts=st.lists(st.integers(0, 200), max_size=6), seed=st.integers(0, 99), shuffle=st.randoms())
def test_merging_is_independent_of_order_and_of_where_the_parts_are_cut(cuts, seed, shuffle):
    x = np.random.default_rng(seed).normal(3, 2, size=(200, 6))
    parts = [Moments.of(p) for p in np.split(x, sorted(cuts))]
    shuffle.shuffle(parts)
    total = Moments.empty(6)
    for part in parts:
        total = total.merge(part)
    assert total.n == 200
    np.testing.assert_allclose(total.mean, x.mean(axis=0), rtol=1e-9)
    np.testing.assert_allclose(total.covariance, np.cov(x, rowvar=False), rtol=1e-9, atol=1e-9)


def test_without_is_the_inverse_of_merge():
    x = np.random.default_rng(0).normal(5, 1, size=(100, 5))
    rest = Moments.of(x).without(Moments.of(x[30:60]))
    expected = Moments.of(np.delete(x, np.s_[30:60], axis=0))
    assert rest.n == 70
    np.testing.assert_allclose(rest.mean, expected.mean, rtol=1e-12)
    np.testing.assert_allclose(rest.covariance, expected.covariance, rtol=1e-9, atol=1e-12)


def test_statistics_survive_a_file(tmp_path):
    moments = moments_of(np.random.default_rng(0).normal(size=(50, 4)))
    save_moments(tmp_path / "own.npz", moments)
    back = load_moments(tmp_path / "own.npz")
    assert back.n == 50
    np.testing.assert_allclose(back.covariance, moments.covariance, rtol=1e-14)


def test_files_of_adm_and_edm_are_read(tmp_path):
    random = np.random.default_rng(0)
    x, s = random.normal(size=(60, 4)), random.normal(size=(60, 3))
    np.savez(
        tmp_path / "adm.npz",
        mu=x.mean(0),
        sigma=np.cov(x, rowvar=False),
        mu_s=s.mean(0).astype(np.float32),
        sigma_s=np.cov(s, rowvar=False).astype(np.float32),
        arr_0=np.zeros((1, 2, 2, 3), np.uint8),
    )
    pool, spatial = load_moments(tmp_path / "adm.npz"), load_moments(tmp_path / "adm.npz", spatial=True)
    assert (pool.n, pool.dim, spatial.dim) == (0, 4, 3)
    assert frechet(pool, moments_of(x)) == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("kind", ["pickle", "missing", "shape", "nan", "text"])
def test_a_file_that_is_no_statistics_is_refused_and_never_unpickled(tmp_path, kind):
    path = tmp_path / "bad.npz"
    good = {"mu": np.zeros(3), "sigma": np.eye(3)}
    if kind == "pickle":
        np.savez(path, mu=np.zeros(3), sigma=np.array([pickle.dumps], dtype=object))
    elif kind == "missing":
        np.savez(path, mu=good["mu"])
    elif kind == "shape":
        np.savez(path, mu=good["mu"], sigma=np.eye(4))
    elif kind == "nan":
        np.savez(path, mu=good["mu"], sigma=np.full((3, 3), np.nan))
    else:
        path.write_text("no archive")
    with pytest.raises(UserError, match="reference"):
        load_moments(path)
