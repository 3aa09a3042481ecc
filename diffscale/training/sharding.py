"""Tensors of which each rank may hold a slice: the rows [start, start + n) of `rows` in all.

torch.distributed.tensor takes as long to import as an eighth of torch, so only what shards (parallel.py) imports it:
before that there is no DTensor.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, NamedTuple, TypeGuard

from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


class Slice(NamedTuple):
    start: int  # first row held here
    rows: int  # rows in all


def is_sharded(tensor: Tensor) -> TypeGuard[DTensor]:
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def local(tensor: Tensor) -> Tensor:
    """What this rank holds of it; writes go through."""
    return tensor.to_local() if is_sharded(tensor) else tensor


def slice_of(tensor: Tensor) -> Slice | None:
    """Which rows this rank holds, None for all of them."""
    if not is_sharded(tensor):
        return None
    from torch.distributed.tensor import Shard
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    if not any(isinstance(p, Shard) for p in tensor.placements):
        return None
    if any(isinstance(p, Shard) and p.dim != 0 for p in tensor.placements):
        raise ValueError(f"placements {tensor.placements}: only rows are sharded here")
    _, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return Slice(offset[0], tensor.shape[0])


def rows_of(tensor: Tensor) -> tuple[int, int] | None:
    """The first and last (exclusive) row held here, None for all of them."""
    place = slice_of(tensor)
    return None if place is None else (place.start, place.start + local(tensor).shape[0])


def like(tensor: Tensor, rows: Tensor) -> Tensor:
    """The rows that this rank holds of something of the tensor's shape, as a tensor sharded like it."""
    if not is_sharded(tensor):
        return rows
    return type(tensor).from_local(
        rows, tensor.device_mesh, tensor.placements, shape=tensor.shape, stride=tensor.stride()
    )


def whole(tensor: Tensor) -> Tensor:
    """All of it on every rank (a collective call for a sharded tensor)."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor
