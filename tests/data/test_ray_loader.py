"""`data.loader: ray_data` yields the same batches as the memory-mapped loader, through real Ray Data."""

from __future__ import annotations

import os

import pytest
import torch

from diffscale.data import create_loader

SETTINGS = {"seed": 3, "global_batch": 24, "flip": True, "start": 48, "stop": 200}


@pytest.fixture(scope="module", autouse=True)
def ray_on_two_cpus():
    os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    import ray

    if not ray.is_initialized():
        ray.init(address="local", num_cpus=2, object_store_memory=100_000_000, include_dashboard=False)
    yield
    ray.shutdown()


def test_ray_data_gives_the_same_batches(dataset):
    shard = (5, 16)
    here = list(create_loader("arrow", dataset, shard=shard, **SETTINGS))
    there = list(create_loader("ray_data", dataset, shard=shard, **SETTINGS))
    assert len(here) == len(there)
    for a, b in zip(here, there, strict=True):
        assert torch.equal(a.positions, b.positions)
        assert torch.equal(a.images, b.images)
        assert torch.equal(a.labels, b.labels)


def test_a_worker_without_a_share_takes_every_step(dataset):
    assert [len(b) for b in create_loader("ray_data", dataset, shard=(4, 4), **SETTINGS)] == [0] * 7
