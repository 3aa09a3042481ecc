"""An optimizer's state as named tensors and plain numbers, by parameter name, so that nothing has to be pickled."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from diffscale.training.sharding import Slice, like, local, rows_of, slice_of

_GROUP = "group"


def flatten(optimizer: torch.optim.Optimizer, model: nn.Module) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """({"PARAMETER/NAME" or "group/0/NAME": tensor}, the same for numbers). Tensors may be sharded like them."""
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
            if isinstance(value, Tensor) or key == "step":  # the rest are settings
                put(f"{_GROUP}/{i}/{key}", value)
    return tensors, numbers


def slices(tensors: dict[str, Tensor], model: nn.Module) -> dict[str, Slice | None]:
    """Which rows of each of `flatten`'s tensors this rank holds. State of a parameter's shape is sharded as it is."""
    parameters = dict(model.named_parameters())
    out: dict[str, Slice | None] = {}
    for key, value in tensors.items():
        p = parameters.get(key.rpartition("/")[0])
        follows = p is not None and local(value).shape == local(p).shape and value.ndim > 0
        out[key] = slice_of(p) if follows and p is not None else None
    return out


def rows(model: nn.Module) -> Callable[[str, tuple[int, ...]], tuple[int, int] | None]:
    """For `read_group`: which rows of a stored tensor this rank holds, by its name and whole shape."""
    parameters = dict(model.named_parameters())

    def wanted(key: str, shape: tuple[int, ...]) -> tuple[int, int] | None:
        p = parameters.get(key.rpartition("/")[0])
        return rows_of(p) if p is not None and tuple(p.shape) == shape else None

    return wanted


def restore(
    optimizer: torch.optim.Optimizer, model: nn.Module, tensors: dict[str, Tensor], numbers: dict[str, Any]
) -> None:
    """The reverse of `flatten`; of each tensor there are the rows that `rows` asks for.

    State comes back with the dtype that it had and, where it has a parameter's shape, with the parameter's strides, as
    the optimizer makes it: fused optimizers walk weights and moments as flat memory on a CPU, and refuse other strides
    on a GPU. `Optimizer.load_state_dict` guarantees neither.
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
    if value.ndim and value.shape == local(p).shape:
        return like(p, torch.empty_like(local(p), dtype=value.dtype).copy_(value))
    stays = name == "step" and not (group.get("fused") or group.get("capturable"))  # a step count is read on the host
    return value if stays else value.to(p.device)


def _check_layout(optimizer: torch.optim.Optimizer) -> None:
    """Assert that state of a parameter's shape is laid out as the parameter."""
    for p, state in optimizer.state.items():
        for name, value in state.items():
            if isinstance(value, Tensor) and value.ndim and value.shape == p.shape:
                got, want = local(value), local(p)
                assert (got.stride(), got.device) == (want.stride(), want.device), (
                    f"{name} of a parameter {tuple(p.shape)} came back with strides {got.stride()} on {got.device}; "
                    f"the parameter has {want.stride()} on {want.device}"
                )
