from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from diffscale.data.loading.order import first_use, permutation, positions_to_indices

FORMS = [{"order": "rows"}, {"order": "blocks", "block_rows": 16, "window": 4}]


@given(n=st.integers(1, 5000), seed=st.integers(0, 2**63), epoch=st.integers(0, 10**6))
@settings(max_examples=80, deadline=None)
def test_every_row_comes_once_in_every_epoch(n, seed, epoch):
    rows = positions_to_indices(np.arange(epoch * n, (epoch + 1) * n), n, seed)
    assert np.array_equal(np.sort(rows), np.arange(n))


@given(n=st.integers(1, 3000), block=st.integers(1, 400), window=st.integers(1, 9), seed=st.integers(0, 2**32))
@settings(max_examples=80, deadline=None)
def test_every_row_comes_once_in_the_blocked_form(n, block, window, seed):
    rows = positions_to_indices(np.arange(n), n, seed, order="blocks", block_rows=block, window=window)
    assert np.array_equal(np.sort(rows), np.arange(n))


@given(n=st.integers(1, 2**60), data=st.data())
@settings(max_examples=60, deadline=None)
def test_the_permutation_can_be_undone_at_any_size(n, data):
    places = np.array(data.draw(st.lists(st.integers(0, n - 1), min_size=1, max_size=20)))
    shuffle = permutation(n, 7)
    rows = shuffle.forward(places)
    assert rows.min() >= 0
    assert rows.max() < n
    assert np.array_equal(shuffle.inverse(rows), places)


@pytest.mark.parametrize("form", FORMS)
def test_a_position_means_the_same_row_however_it_is_read(form):
    n, positions = 1000, np.arange(2500)
    whole = positions_to_indices(positions, n, 5, **form)
    assert whole.tolist() == [int(positions_to_indices(np.array([p]), n, 5, **form)[0]) for p in positions]
    backwards = positions_to_indices(positions[::-1].reshape(50, 50), n, 5, **form)
    assert np.array_equal(backwards.ravel()[::-1], whole)


@pytest.mark.parametrize("n", [1, 2, 3, 50_000, 1_281_167, (1 << 60) - 1])
def test_the_order_is_the_same_without_a_compiler(n, monkeypatch):
    positions = np.random.default_rng(0).integers(0, min(3 * n, 1 << 62), (20, 50))
    rows = positions_to_indices(positions, n, seed=5)
    monkeypatch.setattr("diffscale.kernels.compile.library", lambda name: None)
    assert np.array_equal(positions_to_indices(positions, n, seed=5), rows)


@pytest.mark.parametrize("form", FORMS)
def test_the_order_never_changes_between_versions(form):
    """Known answers of this implementation: a run must resume into the same order after an upgrade."""
    known = {
        "rows": [25, 38, 55, 39, 31, 23, 63, 45],
        "blocks": [18, 61, 63, 27, 13, 42, 39, 17],
    }
    got = positions_to_indices(np.arange(8), 64, 2024, **form).tolist()
    assert got == known[form["order"]]


def test_epochs_and_seeds_give_unrelated_orders():
    n = 2000
    first, second = positions_to_indices(np.arange(2 * n), n, 1).reshape(2, n)
    other = positions_to_indices(np.arange(n), n, 2)
    for a, b in ((first, second), (first, other)):
        assert abs(np.corrcoef(a, b)[0, 1]) < 4 / np.sqrt(n)  # 4 standard errors of no correlation
        assert (a == b).sum() <= 8  # fixed points of a random permutation are Poisson(1)


@pytest.mark.parametrize("n", [3, 10, 50, 1871])
def test_each_row_is_equally_likely_at_each_position(n):
    """Chi-square of the row at some positions over thousands of keys."""
    keys, bins = 4000, min(n, 25)
    positions = np.array([0, n // 2, n - 1])
    rows = np.stack([permutation(n, key, 0).forward(positions) for key in range(keys)])
    for column in rows.T:
        counts = np.bincount(column * bins // n, minlength=bins)
        sizes = np.bincount(np.arange(n) * bins // n, minlength=bins)
        assert stats.chisquare(counts, keys * sizes / n).pvalue > 1e-4


@pytest.mark.parametrize("n", [1000, 50_000, 1_281_167])
def test_neighbours_are_unrelated_and_position_says_nothing_about_the_row(n):
    count = min(n, 100_000)
    places = np.arange(count)
    rows = permutation(n, 3, 0).forward(places)
    error = 1 / np.sqrt(count)
    assert abs(np.corrcoef(places, rows)[0, 1]) < 4 * error
    assert abs(np.corrcoef(rows[:-1], rows[1:])[0, 1]) < 4 * error
    gaps = (rows[1:] - rows[:-1]) % n  # uniform over 1 .. n-1 for a random permutation
    counts = np.bincount(gaps * 100 // n, minlength=100)
    assert stats.chisquare(counts).pvalue > 1e-4
    grid = np.histogram2d(rows[:-1], rows[1:], bins=16, range=[[0, n], [0, n]])[0]
    assert stats.chisquare(grid.ravel()).pvalue > 1e-4


def test_all_orders_of_four_rows_occur_equally_often():
    """A small domain is where Feistel networks are weakest: all 24 permutations over 7,200 keys."""
    seen = np.stack([permutation(4, key).forward(np.arange(4)) for key in range(7200)])
    counts = np.unique(seen @ np.array([64, 16, 4, 1]), return_counts=True)[1]
    assert len(counts) == 24
    assert stats.chisquare(counts).pvalue > 1e-4


def test_blocks_need_only_a_window_of_blocks_at_a_time():
    n, block, window = 10_000, 100, 5
    rows = positions_to_indices(np.arange(n), n, 0, order="blocks", block_rows=block, window=window)
    for first in range(0, n, block * window):
        assert len(np.unique(rows[first : first + block * window] // block)) == window


def test_first_use_is_the_first_position_whose_row_is_in_the_range():
    rows = positions_to_indices(np.arange(5000), 5000, 9)
    expected = int(np.flatnonzero((rows >= 100) & (rows < 103))[0])
    assert first_use(range(100, 103), 5000, 9, 0, 5000) == expected
    assert first_use(range(100, 103), 5000, 9, 0, expected) is None


@pytest.mark.parametrize(("n", "positions"), [(0, [0]), (10, [-1])])
def test_impossible_questions_are_refused(n, positions):
    with pytest.raises(ValueError, match=r"rows|from 0"):
        positions_to_indices(np.array(positions), n, 0)
