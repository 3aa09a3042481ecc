"""Reads the tensors of NVIDIA's EDM and EDM2 pickles without running the source code that is in them.

Their networks unpickle by executing `module_src`. Here a pickle may name ten globals, each of which is a stub: an
object that holds its state, a tensor, or nothing. Every other name refuses the file, whatever it would have done.
"""

from __future__ import annotations

import io
import pickle
import warnings
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


class RefusedPickle(ValueError):
    """A pickle that names something other than what EDM's and EDM2's files need."""


class _Object:
    """What stands for any object of the file: its state, with no behaviour."""

    def __init__(self, *_: Any) -> None:
        self.state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _Dict(dict):
    """What stands for dnnlib's EasyDict."""

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, Mapping):
            self.update(state)


def _persistent_object(meta: Any) -> _Object:
    found = _Object()
    found.state = meta["state"]
    return found


def _storage(data: bytes) -> Tensor:
    """Return all values of a stored storage."""
    with warnings.catch_warnings(category=UserWarning, action="ignore"):  # torch deprecates what the file holds
        stored = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        return torch.empty(0, dtype=stored.dtype).set_(stored.untyped())


def _tensor(storage: Tensor, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: Any) -> Tensor:
    last = offset + sum((n - 1) * s for n, s in zip(size, stride, strict=True))
    if min((offset, *size, *stride)) < 0 or (0 not in size and last >= len(storage)):
        raise ValueError(f"a tensor of {tuple(size)} lies outside of its storage of {len(storage)} values")
    return storage.as_strided(size, stride, offset)


_KNOWN: dict[tuple[str, str], Callable[..., Any]] = {
    ("torch_utils.persistence", "_reconstruct_persistent_obj"): _persistent_object,
    ("torch.storage", "_load_from_bytes"): _storage,
    ("torch._utils", "_rebuild_parameter"): lambda data, *_: data,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("collections", "OrderedDict"): OrderedDict,
    ("torch.nn.modules.container", "ModuleDict"): _Object,
    ("numpy.core.multiarray", "scalar"): _Object,
    ("numpy._core.multiarray", "scalar"): _Object,
    ("numpy", "dtype"): _Object,
    ("dnnlib.util", "EasyDict"): _Dict,
}


class _Reader(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _KNOWN:
            raise RefusedPickle(f"a pickle that names {module}.{name}, which EDM's weights do not need, is not opened")
        return _KNOWN[module, name]

    def persistent_load(self, pid: Any) -> Any:
        raise RefusedPickle("a pickle that refers to objects outside of itself is not opened")


def read_pickle(path: Path) -> dict[str, Tensor]:
    """Return the tensors of the network `ema` in a file, by the names of its state dict.

    Raises RefusedPickle for a file that names anything else, and whatever a damaged file makes pickle raise.
    """
    with open(path, "rb") as file:
        content = _Reader(file).load()
    if not isinstance(content, Mapping) or not isinstance(content.get("ema"), _Object):
        raise RefusedPickle("the pickle holds no network `ema`, as EDM's files do")
    return dict(_tensors_of(content["ema"], "", depth=0))


def _tensors_of(module: Any, prefix: str, depth: int) -> list[tuple[str, Tensor]]:
    """Return (name, tensor) of a module's parameters, buffers and submodules, as `state_dict` orders them."""
    state = module.state if isinstance(module, _Object) else None
    if not isinstance(state, Mapping) or depth > 32:
        return []
    found: list[tuple[str, Tensor]] = []
    for kind in ("_parameters", "_buffers"):
        found += [(f"{prefix}{n}", t) for n, t in _items(state.get(kind)) if isinstance(t, Tensor)]
    for name, inner in _items(state.get("_modules")):
        found += _tensors_of(inner, f"{prefix}{name}.", depth + 1)
    return found


def _items(value: Any) -> list[tuple[Any, Any]]:
    return list(value.items()) if isinstance(value, Mapping) else []
