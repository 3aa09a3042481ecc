from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

# Read when Ray is imported, which test modules do before any run connects.
os.environ.setdefault("RAY_AUTH_MODE", "disabled")
os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

from diffscale.data import Dataset, open_dataset, resolve


@pytest.fixture(scope="package", autouse=True)
def one_thread() -> Iterator[None]:
    """Sums depend on the number of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def shared_storage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A storage whose dataset is built once."""
    return tmp_path_factory.mktemp("storage")


@pytest.fixture(scope="session")
def dataset(shared_storage: Path) -> Dataset:
    return open_dataset(resolve("builtin:emoji", 8, str(shared_storage)))


@pytest.fixture(scope="module")
def private_ray(dataset: object) -> Iterator[None]:
    import ray

    from diffscale.distributed.connect import connect

    connect(num_cpus=2)
    yield
    ray.shutdown()
