"""Small real datasets, a small real network and, for Ray, one private cluster for the whole folder."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from diffscale.data import Dataset, open_dataset
from diffscale.diffusion import SOLVERS, Diffusion, create_diffusion
from diffscale.evaluation.sample_writer import SampleWriter
from diffscale.evaluation.sampling import Sampling
from diffscale.models import create_model

CLASSES = ["red", "green", "blue"]


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """diffscale's cache in a temporary folder, without a network."""
    monkeypatch.setenv("DIFFSCALE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("DIFFSCALE_OFFLINE", "1")
    return tmp_path / "cache"


def pictures(n: int, side: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """(n,H,W,3) uint8 of smooth blobs whose strongest channel is the class, and labels."""
    random = np.random.default_rng(seed)
    labels = np.arange(n) % len(CLASSES)
    grid = np.linspace(-1, 1, side)
    centre = random.uniform(-0.5, 0.5, (n, 2, 1, 1))
    blob = np.exp(-3 * ((grid[None, :, None] - centre[:, 0]) ** 2 + (grid[None, None] - centre[:, 1]) ** 2))
    colour = random.uniform(20, 90, (n, 3))
    colour[np.arange(n), labels] += 150
    return (blob[..., None] * colour[:, None, None] + random.uniform(0, 15, (n, side, side, 3))).astype(
        np.uint8
    ), labels


def write_dataset(folder: Path, n: int, side: int, seed: int = 0) -> Dataset:
    images, labels = pictures(n, side, seed)
    keeper = SampleWriter(folder, "arrow", (3, side, side), CLASSES, {})
    keeper(0, {"images": images.transpose(0, 3, 1, 2).reshape(n, -1), "labels": labels})
    keeper.close()
    return open_dataset(str(folder))


@pytest.fixture
def dataset(tmp_path) -> Dataset:
    return write_dataset(tmp_path / "data", 48, 16)


@pytest.fixture
def network() -> torch.nn.Module:
    torch.manual_seed(0)
    model = create_model(
        "unet",
        resolution=16,
        channels=3,
        num_classes=3,
        model_channels=16,
        channel_mult=(1, 2),
        num_blocks=1,
        attn_resolutions=(8,),
        channels_per_head=16,
    )
    for parameter in model.parameters():  # so that outputs that begin at zero say something
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.1)
    return model


@pytest.fixture
def diffusion() -> Diffusion:
    return create_diffusion(
        schedule={"name": "simple_cosine"},
        interpolant="vp",
        prediction="v",
        weighting={"name": "min_snr"},
        resolution=16,
    )


@pytest.fixture
def sampling() -> Sampling:
    return Sampling(SOLVERS["ddim"](steps=2), "ddim", batch=8)


@pytest.fixture(scope="session")
def ray_cluster():
    import ray

    ray.init(address="local", num_cpus=2, object_store_memory=200_000_000, include_dashboard=False)
    yield
    ray.shutdown()
