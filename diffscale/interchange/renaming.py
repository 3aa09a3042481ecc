"""From a file's names to ours: a mapping of tensors, changes of layout, and the check that it fits a network."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from functools import partial
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

RowOrder = Literal["head d 3", "head 3 d", "3 head d"]
"""Order of the rows of a layer that gives q, k and v of all heads, each of width d. Ours is 3 head d."""


class Renamed(NamedTuple):
    """A tensor under our name, and the name that the file gives it."""

    source: str
    tensor: Tensor


Weights = dict[str, Renamed]
"""Tensors by our names, in the order of the file."""


class UnfitError(ValueError):
    """The first weight that does not fit a network; the text says which and why."""


def rename(tensors: Iterable[tuple[str, Tensor]], name_of: Callable[[str], str | None]) -> Weights:
    """Return tensors under the names that `name_of` gives them; those of None are left out."""
    found: Weights = {}
    for source, tensor in tensors:
        name = name_of(source)
        if name is not None:
            found[name] = Renamed(source, tensor)
    return found


def by_rules(rules: Iterable[tuple[str, str]]) -> Callable[[str], str]:
    """Return a function that applies each (pattern, replacement) to a name in turn."""
    compiled = [(re.compile(pattern), replacement) for pattern, replacement in rules]

    def name_of(name: str) -> str:
        for pattern, replacement in compiled:
            name = pattern.sub(replacement, name)
        return name

    return name_of


def change(weights: Weights, name: str, how: Callable[[Tensor], Tensor]) -> None:
    """Replace the tensor of a name by `how` of it, if there is one."""
    if name in weights:
        weights[name] = weights[name]._replace(tensor=how(weights[name].tensor))


def flatten_attention(weights: Weights) -> None:
    """Make the 1 × 1 convolutions of attentions the linear layers that ours are."""
    for name in weights:
        if re.search(r"\.attention\.(qkv|out)\.weight$", name):
            change(weights, name, lambda t: t.flatten(1))


def order_rows(weights: Weights, model: nn.Module, order: RowOrder) -> None:
    """Bring the rows of every `qkv` layer into our order. The model says how many heads each has."""
    if order == "3 head d":
        return
    heads = {name: getattr(module, "heads", None) for name, module in model.named_modules()}
    for name in weights:
        found = re.fullmatch(r"(.*)\.qkv\.(weight|bias)", name)
        count = heads.get(found[1]) if found else None
        if isinstance(count, int) and count:
            change(weights, name, partial(_reordered, heads=count, order=order))


def _reordered(rows: Tensor, heads: int, order: RowOrder) -> Tensor:
    if rows.shape[0] % (3 * heads):
        return rows  # the check of the shapes tells
    if order == "head d 3":
        return rows.unflatten(0, (heads, -1, 3)).movedim(2, 0).flatten(0, 2)
    return rows.unflatten(0, (heads, 3, -1)).movedim(1, 0).flatten(0, 2)


def swap_halves(tensor: Tensor, dim: int = 0) -> Tensor:
    """Exchange the two halves along a dimension: sines before cosines become cosines before sines."""
    first, second = tensor.chunk(2, dim)
    return torch.cat([second, first], dim)


def state_dict_for(model: nn.Module, weights: Weights, given: Iterable[str] = ()) -> dict[str, Tensor]:
    """Return the model's state from a file's weights, in float32, checking names and shapes.

    Raises UnfitError that names the first weight of the file that the model does not have or has in another shape, or
    the model's first weight that the file lacks.

    given: names that the model itself sets and a file may lack
    """
    own = model.state_dict()
    for name, (source, tensor) in weights.items():
        if name not in own:
            raise UnfitError(f"{source} {tuple(tensor.shape)}: this network has no such weight")
        if tensor.shape != own[name].shape:
            raise UnfitError(f"{source} has the shape {tuple(tensor.shape)}, this network's {tuple(own[name].shape)}")
    allowed = set(given)
    for name, tensor in own.items():
        if name not in weights and name not in allowed:
            raise UnfitError(f"the file lacks {name} {tuple(tensor.shape)}")
    found = {name: weights[name].tensor if name in weights else tensor for name, tensor in own.items()}
    return {name: t.to(torch.float32).contiguous() if t.is_floating_point() else t for name, t in found.items()}
