"""An optimizer's state as named tensors and plain numbers, by parameter name, so that nothing has to be pickled."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from diffscale.training.sharding import Slice, is_sharded, like, local, rows_of, slice_of

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
    """The reverse of `flatten`; of each tensor there are the rows that `rows` asks for."""
    names = {id(p): name for name, p in model.named_parameters()}
    plain = optimizer.state_dict()
    ordered = [p for group in optimizer.param_groups for p in group["params"]]
    by_parameter: dict[str, dict[str, Any]] = {}
    for key, value in {**tensors, **numbers}.items():
        owner, _, name = key.rpartition("/")
        if owner.startswith(f"{_GROUP}/"):
            plain["param_groups"][int(owner.split("/")[1])][name] = value
        else:
            by_parameter.setdefault(owner, {})[name] = value
    plain["state"] = {}
    for i, p in enumerate(ordered):
        state = by_parameter.get(names[id(p)])
        if state is not None:
            plain["state"][i] = {k: _sharded_as(p, v) for k, v in state.items()}
    optimizer.load_state_dict(plain)


def _sharded_as(p: Tensor, value: Any) -> Any:
    if not isinstance(value, Tensor) or not is_sharded(p) or value.shape != p.to_local().shape:
        return value
    return like(p, value.to(p.device).contiguous())
