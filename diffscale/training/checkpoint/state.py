"""What ranks and optimizers hold, as named tensors and plain numbers: slices of sharded tensors, optimizer state.

A sharded tensor is a DTensor of which each rank holds a slice of rows. torch.distributed.tensor takes an eighth of
torch's time to import, so only `parallel.shard` imports it: before `shard` no DTensor exists. Optimizer state is stored
by parameter name, so that nothing has to be pickled.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple, TypeGuard

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

_GROUP = "group"


# ---- slices of sharded tensors


class Slice(NamedTuple):
    """The rows of a tensor that one rank holds, from `start` on."""

    start: int  # first row that this rank holds
    rows: int  # rows of the full tensor


def part_rows(rows: int, part: int, parts: int) -> tuple[int, int]:
    """Return the first and last (exclusive) row of a part, as torch.chunk cuts: ⌈rows / parts⌉ in all but the last."""
    chunk = -(-rows // parts)
    return min(part * chunk, rows), min((part + 1) * chunk, rows)


def part_of(tensor: Tensor, part: int, parts: int) -> tuple[Tensor, Slice | None]:
    """Return a part of a replicated tensor, which shares its memory, and its place. A number is whole in every part."""
    if tensor.ndim == 0:
        return tensor, None
    first, last = part_rows(tensor.shape[0], part, parts)
    return tensor[first:last], Slice(first, tensor.shape[0])


def is_sharded(tensor: Tensor) -> TypeGuard[DTensor]:
    """Return whether a tensor is a DTensor."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def local_shard(tensor: Tensor) -> Tensor:
    """Return this rank's rows of a tensor, or the tensor if it is not sharded. Writes change the tensor."""
    return tensor.to_local() if is_sharded(tensor) else tensor


def row_slice(tensor: Tensor) -> Slice | None:
    """Return which rows this rank holds, or None for all of them."""
    if not is_sharded(tensor):
        return None
    from torch.distributed.tensor import Shard  # import cost

    cut = [(i, p.dim) for i, p in enumerate(tensor.placements) if isinstance(p, Shard)]
    if not cut:
        return None
    if len(cut) > 1 or cut[0][1] != 0:
        raise ValueError(f"placements {tensor.placements}: only rows can be sharded, over one dimension of ranks")
    rows, mesh, over = tensor.shape[0], tensor.device_mesh, cut[0][0]
    return Slice(part_rows(rows, mesh.get_local_rank(over), mesh.size(over))[0], rows)


def local_rows(tensor: Tensor) -> tuple[int, int] | None:
    """Return the first and last (exclusive) row that this rank holds, or None for all rows."""
    place = row_slice(tensor)
    return None if place is None else (place.start, place.start + local_shard(tensor).shape[0])


def sharded_like(tensor: Tensor, rows: Tensor) -> Tensor:
    """Return this rank's rows of a value as a tensor that is sharded as `tensor` is.

    tensor: gives the full shape and the placement
    rows: the rows of the value that this rank holds
    """
    if not is_sharded(tensor):
        return rows
    return type(tensor).from_local(
        rows, tensor.device_mesh, tensor.placements, shape=tensor.shape, stride=tensor.stride()
    )


# ---- optimizer state


def flatten_optimizer(optimizer: torch.optim.Optimizer, model: nn.Module) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return an optimizer's tensors and numbers, named "PARAMETER/NAME" or "group/0/NAME".

    Tensors are sharded as their parameters are. Raises TypeError for state that is neither tensor nor number.
    """
    names = {id(p): name for name, p in model.named_parameters()}
    tensors: dict[str, Tensor] = {}
    numbers: dict[str, Any] = {}

    def put(key: str, value: Any) -> None:
        if isinstance(value, Tensor):
            tensors[key] = value
        elif isinstance(value, (int, float, bool)):
            numbers[key] = value
        elif value is not None:
            raise TypeError(f"optimizer state {key} is a {type(value).__name__}, neither tensor nor number")

    for p, state in optimizer.state.items():
        for key, value in state.items():
            put(f"{names[id(p)]}/{key}", value)
    for i, group in enumerate(optimizer.param_groups):
        for key, value in group.items():
            if (isinstance(value, Tensor) and key != "lr") or key == "step":  # the other values are settings
                put(f"{_GROUP}/{i}/{key}", value)
    return tensors, numbers


def optimizer_slices(tensors: dict[str, Tensor], model: nn.Module) -> dict[str, Slice | None]:
    """Return which rows of each tensor of `flatten_optimizer` this rank holds.

    State of a parameter's shape is sharded as the parameter is.
    """
    parameters = dict(model.named_parameters())
    out: dict[str, Slice | None] = {}
    for key, value in tensors.items():
        p = parameters.get(key.rpartition("/")[0])
        follows = p is not None and local_shard(value).shape == local_shard(p).shape and value.ndim > 0
        out[key] = row_slice(p) if follows and p is not None else None
    return out


def optimizer_rows(model: nn.Module) -> Callable[[str, tuple[int, ...]], tuple[int, int] | None]:
    """Return a function for `read_group`: the rows of a stored tensor that this rank holds, by name and full shape."""
    parameters = dict(model.named_parameters())

    def wanted(key: str, shape: tuple[int, ...]) -> tuple[int, int] | None:
        p = parameters.get(key.rpartition("/")[0])
        return local_rows(p) if p is not None and tuple(p.shape) == shape else None

    return wanted


def restore_optimizer(
    optimizer: torch.optim.Optimizer, model: nn.Module, tensors: dict[str, Tensor], numbers: dict[str, Any]
) -> None:
    """Put back what `flatten_optimizer` returned; tensors hold the rows that `optimizer_rows` selects.

    State keeps the dtype it was stored with. State of a parameter's shape gets the parameter's strides, as the
    optimizer itself creates it: fused optimizers walk weights and moments as flat memory on a CPU, and refuse other
    strides on a GPU. `Optimizer.load_state_dict` guarantees neither.
    """
    parameters = dict(model.named_parameters())
    group_of = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    optimizer.state.clear()
    for key, value in {**tensors, **numbers}.items():
        owner, _, name = key.rpartition("/")
        if owner.startswith(f"{_GROUP}/"):
            optimizer.param_groups[int(owner.split("/")[1])][name] = value
        else:
            p = parameters[owner]
            optimizer.state[p][name] = _restored(name, value, p, group_of[id(p)])
    _check_layout(optimizer)


def _restored(name: str, value: Any, p: Tensor, group: dict[str, Any]) -> Any:
    if not isinstance(value, Tensor):
        return value
    if value.ndim and value.shape == local_shard(p).shape:
        return sharded_like(p, torch.empty_like(local_shard(p), dtype=value.dtype).copy_(value))
    on_host = name == "step" and not (group.get("fused") or group.get("capturable"))  # the optimizer reads it there
    return value if on_host else value.to(p.device)


def _check_layout(optimizer: torch.optim.Optimizer) -> None:
    """Assert that state of a parameter's shape is laid out as the parameter is."""
    for p, state in optimizer.state.items():
        for name, value in state.items():
            if isinstance(value, Tensor) and value.ndim and value.shape == p.shape:
                got, want = local_shard(value), local_shard(p)
                assert (got.stride(), got.device) == (want.stride(), want.device), (
                    f"{name} of a parameter {tuple(p.shape)} came back with strides {got.stride()} on {got.device}; "
                    f"the parameter has {want.stride()} on {want.device}"
                )
