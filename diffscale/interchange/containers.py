"""Reads the tensors of a file of weights, whatever its container, without running anything that is in the file.

safetensors hold tensors alone. torch's files are read with `weights_only`. NVIDIA's pickles, which hold source code and
cannot be read so, go through a reader of their own (pickles.py).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from diffscale.core.errors import UserError
from diffscale.core.hashing import file_sha256
from diffscale.core.text import one_line
from diffscale.interchange.pickles import RefusedPickle, read_pickle

ZIP, PICKLE = b"PK\x03\x04", b"\x80"
WEIGHTS_OF_FOLDER = ("diffusion_pytorch_model.safetensors", "model.safetensors")


@dataclass(frozen=True)
class Source:
    """A file of weights."""

    path: Path
    sha256: str
    container: str  # safetensors, torch or pickle
    tensors: dict[str, Tensor]
    config: dict[str, Any] = field(default_factory=dict)  # of a folder with config.json


def read_source(path: Path, parts: tuple[str, ...]) -> Source:
    """Read a file, or a folder with safetensors and config.json.

    Raises UserError for a file that is missing, damaged, of no known container, or that asks for code.

    parts: names under which a torch file may hold the weights among others, the preferred first; it is taken itself
        if it has none of them
    """
    config: dict[str, Any] = {}
    if path.is_dir():
        path, config = _in_folder(path)
    try:
        with open(path, "rb") as file:
            head = file.read(9)
    except OSError as error:
        raise _unreadable(path, error.strerror or one_line(error)) from None
    try:
        if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < path.stat().st_size:
            container, tensors = "safetensors", _read_safetensors(path)
        elif head[:4] == ZIP:
            container, tensors = "torch", _of_part(_read_torch(path), parts)
        elif head[:1] == PICKLE:
            container, tensors = "pickle", read_pickle(path)
        else:
            raise _unreadable(path, "it is neither safetensors nor a file of torch.save nor a pickle")
    except RefusedPickle as error:
        raise _unreadable(path, str(error)) from None
    except UserError:
        raise
    except Exception as error:  # whatever a damaged file makes a parser raise
        raise _unreadable(path, one_line(error) or type(error).__name__) from None
    if not tensors:
        raise _unreadable(path, "it holds no tensors")
    return Source(path, file_sha256(path), container, tensors, config)


def _in_folder(folder: Path) -> tuple[Path, dict[str, Any]]:
    for name in WEIGHTS_OF_FOLDER:
        if (folder / name).is_file():
            try:
                config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
                if not isinstance(config, dict):
                    raise ValueError("not a mapping")
            except (OSError, ValueError, RecursionError) as error:
                raise _unreadable(folder / "config.json", one_line(error)) from None
            return folder / name, config
    raise _unreadable(folder, f"it holds none of {', '.join(WEIGHTS_OF_FOLDER)}")


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise _unreadable(path, one_line(error)) from None


def _read_torch(path: Path) -> Any:
    """Return the content of a file of torch.save: tensors, plain values, and the arguments of a command line."""
    with torch.serialization.safe_globals([argparse.Namespace]):
        return torch.load(path, map_location="cpu", weights_only=True)


def _of_part(content: Any, parts: tuple[str, ...]) -> dict[str, Tensor]:
    if not isinstance(content, Mapping):
        raise ValueError("it holds no mapping of names to tensors")
    for part in parts:
        if isinstance(content.get(part), Mapping):
            content = content[part]
            break
    return {str(name): value.detach() for name, value in content.items() if isinstance(value, Tensor)}


def _unreadable(path: Path, reason: str) -> UserError:
    return UserError(setting="FILE", value=str(path), expected="an undamaged file of weights", reason=reason)
