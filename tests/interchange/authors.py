"""Files in the authors' layouts: names and shapes from their code, weights that follow from the names.

`layouts/*.json` were made by building small networks of the authors' code outside of this repository (NVlabs/edm,
NVlabs/edm2, openai/guided-diffusion, openai/improved-diffusion, atong01/conditional-flow-matching,
facebookresearch/DiT, crowsonkb/k-diffusion), filling them by `weight_of` and running them on `images`.
"""

from __future__ import annotations

import json
import math
import types
import zlib
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

LAYOUTS = {path.stem: json.loads(path.read_text()) for path in sorted((Path(__file__).parent / "layouts").glob("*"))}


def weight_of(name: str, shape: tuple[int, ...]) -> Tensor:
    """The tensor of a name: the same wherever it is made."""
    values = torch.randn(
        shape, generator=torch.Generator().manual_seed(zlib.crc32(name.removeprefix("model.").encode()))
    )
    if len(shape) > 1:
        return values / math.sqrt(math.prod(shape[1:]))
    return 1 + 0.1 * values if name.endswith(("weight", "scale", "gain")) else 0.1 * values


def tensors_of(layout: dict[str, Any]) -> dict[str, Tensor]:
    """The file's tensors, without those that follow from the architecture."""
    skipped = set(layout["skipped"])
    return {n: weight_of(n, tuple(s)) for n, s in layout["shapes"].items() if n not in skipped}


def images(layout: dict[str, Any]) -> Tensor:
    """The input on which the authors' network was run."""
    side = layout["side"]
    return torch.randn(2, layout["channels"], side, side, generator=torch.Generator().manual_seed(1))


# ---- NVIDIA's pickles


def _module(name: str, **members: Any) -> types.ModuleType:
    module = types.ModuleType(name)
    for key, value in members.items():
        value.__module__, value.__qualname__, value.__name__ = name, key, key
        setattr(module, key, value)
    return module


def _reconstruct(meta: Any) -> Any:
    raise AssertionError("the authors' function, which would execute the source in the file, was called")


class _EasyDict(dict):
    pass


NVIDIA = {
    "torch_utils": types.ModuleType("torch_utils"),
    "torch_utils.persistence": _module("torch_utils.persistence", _reconstruct_persistent_obj=_reconstruct),
    "dnnlib": types.ModuleType("dnnlib"),
    "dnnlib.util": _module("dnnlib.util", EasyDict=_EasyDict),
}
"""Modules under whose names NVIDIA's objects are pickled, to be put into sys.modules while a file is made."""


class Persistent:
    """An object that is pickled as NVIDIA's code does: its state with the source of its class."""

    def __init__(self, state: dict[str, Any]) -> None:
        self.state = state

    def __reduce__(self) -> Any:
        meta = _EasyDict(type="class", version=6, module_src="raise SystemExit('executed')", class_name="SongUNet")
        meta["state"] = self.state
        return _reconstruct, (meta,)


def module_tree(tensors: dict[str, Tensor]) -> Persistent:
    """The nested modules of a state dict."""
    state: dict[str, Any] = {"training": False, "_buffers": {}, "_parameters": OrderedDict(), "_modules": OrderedDict()}
    inner: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        head, dot, rest = name.partition(".")
        if dot:
            inner.setdefault(head, {})[rest] = tensor
        else:
            state["_parameters"][head] = torch.nn.Parameter(tensor)
    state["_modules"].update({name: module_tree(part) for name, part in inner.items()})
    state["init"] = np.float64(0.5)
    return Persistent(state)
