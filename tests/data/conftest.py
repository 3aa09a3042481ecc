"""Small real datasets and images that the data tests share."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from diffscale.data import Dataset, open_dataset
from tests.support.datasets import pictures, write_dataset


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    """Nothing that a test verifies or fetches is remembered in the user's own cache."""
    monkeypatch.setenv("DIFFSCALE_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def images() -> NDArray[np.uint8]:
    return pictures(100)


@pytest.fixture
def dataset(tmp_path, images) -> Dataset:
    """100 images of 8 x 8 in three shards."""
    write_dataset(tmp_path / "dataset", images)
    return open_dataset(str(tmp_path / "dataset"))
