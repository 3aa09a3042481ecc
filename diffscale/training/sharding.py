"""Tensors of which each rank may hold a slice: the rows [start, start + n) of `rows` in all."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset


class Slice(NamedTuple):
    start: int  # first row held here
    rows: int  # rows in all


def local(tensor: Tensor) -> Tensor:
    """What this rank holds of it; writes go through."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def slice_of(tensor: Tensor) -> Slice | None:
    """Which rows this rank holds, None for all of them."""
    if not isinstance(tensor, DTensor) or not any(isinstance(p, Shard) for p in tensor.placements):
        return None
    if any(isinstance(p, Shard) and p.dim != 0 for p in tensor.placements):
        raise ValueError(f"placements {tensor.placements}: only rows are sharded here")
    _, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return Slice(offset[0], tensor.shape[0])


def rows_of(tensor: Tensor) -> tuple[int, int] | None:
    """The first and last (exclusive) row held here, None for all of them."""
    place = slice_of(tensor)
    return None if place is None else (place.start, place.start + local(tensor).shape[0])


def whole(tensor: Tensor) -> Tensor:
    """All of it on every rank (a collective call for a sharded tensor)."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
