"""Order, augmentation and loading of training batches."""

from __future__ import annotations

from typing import Any, Literal

from diffscale.data.format.dataset import Dataset
from diffscale.data.loading.lanes import lane_share
from diffscale.data.loading.loader import Loader
from diffscale.data.loading.order import Order
from diffscale.data.loading.ray_loader import RayDataLoader


def create_loader(kind: Literal["arrow", "ray_data"], dataset: Dataset, **options: Any) -> Loader:
    """Return the loader of the setting `data.loader`. Both take the arguments of Loader and yield the same batches."""
    return (Loader if kind == "arrow" else RayDataLoader)(dataset, **options)


def share_of_batch(order: Order, global_batch: int, rank: int, workers: int, lanes: int) -> range:
    """Return a worker's places in each global batch: its lanes' with `order=lanes`, else neighbouring ones.

    Raises UserError for a number of workers that does not divide the lanes.
    """
    if order == "lanes":
        return lane_share(global_batch, rank, workers, lanes)
    return range(*even_share(global_batch, rank, workers))


def even_share(global_batch: int, rank: int, world_size: int) -> tuple[int, int]:
    """Return (first, last) of a worker's share of each global batch; shares differ by at most one image."""
    return rank * global_batch // world_size, (rank + 1) * global_batch // world_size
