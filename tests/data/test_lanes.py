"""The order by lanes: exact epochs, the same batches on any fitting number of workers, and a share of the data each."""

from __future__ import annotations

import tracemalloc
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffscale.config.experiment import Experiment
from diffscale.config.load import load_experiment
from diffscale.core.errors import UserError
from diffscale.data import Loader, positions_to_indices
from diffscale.data.loading.lanes import lane_share, lane_starts, parts_of_lanes


@given(
    n=st.integers(1, 3000),
    lanes=st.integers(1, 96),
    block=st.integers(1, 400),
    window=st.integers(1, 300),
    epoch=st.integers(0, 10**6),
)
@settings(max_examples=60, deadline=None)
def test_every_row_comes_once_in_every_epoch(n, lanes, block, window, epoch):
    positions = np.arange(epoch * n, (epoch + 1) * n)
    rows = positions_to_indices(positions, n, 5, order="lanes", block_rows=block, window=window, lanes=lanes)
    assert np.array_equal(np.sort(rows), np.arange(n))


@given(n=st.integers(100, 3000), lanes=st.sampled_from([1, 6, 8, 48, 64]), epoch=st.integers(0, 100))
@settings(max_examples=40, deadline=None)
def test_the_lane_of_a_position_never_changes_and_owns_a_part_of_the_rows(n, lanes, epoch):
    """Boundaries move by no more rows than an epoch has places after its last whole round."""
    positions = np.arange(epoch * n, (epoch + 1) * n)
    rows = positions_to_indices(positions, n, 5, order="lanes", block_rows=16, lanes=lanes)
    first = lane_starts(n, lanes, 0)
    for lane in range(lanes):
        part, own = parts_of_lanes(lanes)[lane], rows[positions % lanes == lane]
        assert own.min() >= first[part] - lanes
        assert own.max() < first[part + 1] + lanes


def test_a_position_means_the_same_row_however_it_is_read():
    form = {"order": "lanes", "block_rows": 16, "window": 4, "lanes": 12}
    whole = positions_to_indices(np.arange(2500), 1000, 5, **form)
    assert whole.tolist() == [int(positions_to_indices(np.array([p]), 1000, 5, **form)[0]) for p in range(2500)]


def test_the_order_never_changes_between_versions():
    """Known answers of this implementation: a run must resume into the same order after an upgrade."""
    rows = positions_to_indices(np.arange(8), 64, 2024, order="lanes", block_rows=4, window=1, lanes=8)
    assert rows.tolist() == KNOWN


KNOWN = [0, 32, 18, 54, 8, 45, 29, 56]


@pytest.mark.parametrize("workers", [2, 3, 4, 6, 12])
def test_global_batches_are_the_same_on_every_number_of_workers_that_divides_the_lanes(dataset, workers):
    form = {"seed": 3, "global_batch": 24, "flip": True, "order": "lanes", "lanes": 12, "block_rows": 3, "stop": 24 * 9}
    with Loader(dataset, **form) as loader:
        alone = list(loader)
    parts = []
    for rank in range(workers):
        with Loader(dataset, shard=lane_share(24, rank, workers, 12), **form) as loader:
            parts.append(list(loader))
    for k, whole in enumerate(alone):
        positions = torch.cat([part[k].positions for part in parts])
        order = positions.argsort()
        assert torch.equal(positions[order], whole.positions)
        for name in ("images", "labels"):
            assert torch.equal(torch.cat([getattr(part[k], name) for part in parts])[order], getattr(whole, name))


def test_a_run_resumes_from_one_integer(dataset):
    form = {"seed": 3, "global_batch": 24, "order": "lanes", "lanes": 4, "shard": lane_share(24, 1, 4, 4), "stop": 240}
    with Loader(dataset, **form) as loader:
        whole = list(loader)
    with Loader(dataset, start=120, **form) as loader:
        resumed = list(loader)
    assert all(torch.equal(a.images, b.images) for a, b in zip(whole[5:], resumed, strict=True))


@pytest.mark.parametrize("workers", [2, 8, 64, 256])
def test_a_worker_reads_its_share_and_neighbouring_ranks_neighbouring_parts(workers):
    """Three epochs of 20,000 rows in 1,000 blocks: the blocks that a rank touches are its share and one at each end."""
    n, lanes, block = 20_000, 256, 20
    positions = np.arange(3 * n // 256 * 256).reshape(-1, 256)
    touched = []
    for rank in range(workers):
        own = positions[:, np.array(lane_share(256, rank, workers, lanes))].ravel()
        rows = positions_to_indices(own, n, 1, order="lanes", block_rows=block, lanes=lanes)
        touched.append(np.unique(rows // block))
    assert all(len(blocks) <= n / block / workers + 2 for blocks in touched)
    assert all(a.max() <= b.min() + 1 for a, b in pairwise(touched))


def test_a_batch_draws_from_as_many_parts_as_it_has_images():
    """On rows sorted by class, with as many classes as lanes, a batch of 64 has 64 classes."""
    n, lanes = 64_000, 256
    rows = positions_to_indices(np.arange(64 * 50), n, 0, order="lanes", block_rows=1000, lanes=lanes)
    classes = (rows * lanes // n).reshape(-1, 64)
    assert min(len(np.unique(batch)) for batch in classes) == 64


def test_a_lane_needs_one_window_at_a_time():
    form = {"order": "lanes", "lanes": 4, "block_rows": 25, "window": 8}  # two blocks in each lane at a time
    rows = positions_to_indices(np.arange(0, 2000, 4), 2000, 0, **form)
    for first in range(0, 500, 50):
        assert len(np.unique(rows[first : first + 50] // 25)) == 2


def test_workers_that_no_lanes_divide_are_refused_with_the_numbers_that_work():
    given = ["data.order=lanes", "data.lanes=12", "train.global_batch=60"]
    assert load_experiment("quickstart-unet", [*given, "train.workers=6"]).train.workers == 6
    for workers in ("5", "8", "[1,6]"):
        with pytest.raises(UserError, match=r"train\.workers(.|\n)*1, 2, 3, 4, 6, 12(.|\n)*data\.lanes = 12"):
            load_experiment("quickstart-unet", [*given, f"train.workers={workers}"])


def test_lanes_are_part_of_a_run_only_where_the_order_uses_them():
    def run_id(**data):
        return Experiment(name="x", storage="/x", data=data, train={"images": 1}).run_id("0" * 16)

    assert run_id(lanes=8) == run_id()
    assert len({run_id(), run_id(order="lanes"), run_id(order="lanes", lanes=8)}) == 3


def test_lanes_of_a_billion_rows_need_little_memory():
    share = np.array(lane_share(2048, 5, 64, 1024))
    tracemalloc.start()
    rows = positions_to_indices(share + 2048 * np.arange(100)[:, None], 10**9, 0, order="lanes", block_rows=20_000)
    assert len(np.unique(rows)) == rows.size
    assert tracemalloc.get_traced_memory()[1] < 4 << 20
    tracemalloc.stop()
