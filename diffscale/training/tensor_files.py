"""Groups of named tensors in safetensors files, whole or one slice per rank; read without pickle, checked by SHA-256.

A group NAME is `NAME.safetensors`, or `NAME.00000-of-00004.safetensors` and so on, in which each tensor is a slice of
rows; where it belongs is in the header. Any number of readers can take any rows of it.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load
from torch import Tensor

from diffscale import storage
from diffscale.training.sharding import Slice

_NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
SLICES = "slices"


class FileInfo(NamedTuple):
    sha256: str
    bytes: int


class Damaged(Exception):
    """A file of a checkpoint is missing, short or altered."""


def write_group(
    folder: str, group: str, tensors: Mapping[str, Tensor], slices: Mapping[str, Slice | None], rank: int, size: int
) -> dict[str, FileInfo]:
    """Writes this rank's file of a group; gives its name and checksum. Tensors are on the CPU.

    Tensors that are not sliced are written by rank 0 alone; with one rank or no slices there is one plain file.
    """
    if not any(slices.get(name) for name in tensors) and size > 1:
        size = 1
        if rank:
            return {}
    name = f"{group}.safetensors" if size == 1 else f"{group}.{rank:05d}-of-{size:05d}.safetensors"
    kept = {n: t for n, t in tensors.items() if rank == 0 or slices.get(n)}
    places = {n: list(s) for n in kept if (s := slices.get(n)) is not None}
    return {name: _write(storage.join(folder, name), kept, {SLICES: json.dumps(places)})}


def read_group(folder: str, group: str) -> dict[str, Tensor]:
    """The tensors of a group, whole, however many files they are in. Raises Damaged when nothing is there."""
    files = group_files(folder, group)
    if not files:
        raise Damaged(f"{folder}: no tensors {group}")
    parts: dict[str, list[tuple[int, Tensor]]] = {}
    for file in files:
        tensors, places = _read(file)
        for name, tensor in tensors.items():
            start = places.get(name, 0)
            parts.setdefault(name, []).append((start, tensor))
    out = {}
    for name, pieces in parts.items():
        pieces.sort(key=lambda piece: piece[0])
        try:
            out[name] = pieces[0][1] if len(pieces) == 1 else torch.cat([t for _, t in pieces])
        except RuntimeError as error:
            raise Damaged(f"{folder}: slices of {name} do not fit: {error}") from None
    return out


def group_files(folder: str, group: str) -> list[str]:
    parent, _, base = group.rpartition("/")
    place = storage.join(folder, parent) if parent else folder
    pattern = re.compile(re.escape(base) + r"(\.\d{5}-of-\d{5})?\.safetensors")
    return [f for f in storage.list_files(place, ".safetensors") if pattern.fullmatch(f.rpartition("/")[2])]


def groups_in(folder: str) -> list[str]:
    """Names of the groups in a folder, without its subfolders'."""
    names = (f.rpartition("/")[2] for f in storage.list_files(folder, ".safetensors"))
    return sorted({re.sub(r"(\.\d{5}-of-\d{5})?\.safetensors$", "", name) for name in names})


def checksum(uri: str) -> FileInfo:
    """Raises FileNotFoundError."""
    fs, path = storage.filesystem(uri)
    digest, count = hashlib.sha256(), 0
    with fs.open_input_stream(path) as file:
        while chunk := file.read(1 << 24):
            digest.update(chunk)
            count += len(chunk)
    return FileInfo(digest.hexdigest(), count)


def _read(uri: str) -> tuple[dict[str, Tensor], dict[str, int]]:
    """The file's tensors, and the first row of those that are slices."""
    try:
        if storage.is_remote(uri):
            data = storage.read_bytes(uri)
            length = struct.unpack("<Q", data[:8])[0]
            metadata = json.loads(data[8 : 8 + length]).get("__metadata__", {})
            tensors = load(data)
        else:
            with safe_open(uri.removeprefix("file://"), framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        places = json.loads(metadata.get(SLICES, "{}"))
        return tensors, {str(name): int(place[0]) for name, place in places.items()}
    except (
        SafetensorError, OSError, ValueError, struct.error, TypeError, AttributeError, LookupError, RecursionError,
        RuntimeError, OverflowError,
    ) as error:  # fmt: skip
        raise Damaged(f"{uri}: {error}") from None


def _write(uri: str, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> FileInfo:
    """The safetensors format (8 bytes length, JSON header, data), streamed: nothing is held twice, and the checksum is
    made on the way. Largest alignment first, as the library orders it; then by name."""
    order = sorted(tensors, key=lambda n: (-tensors[n].element_size(), n))
    header: dict[str, Any] = {"__metadata__": metadata}
    offset = 0
    for name in order:
        t = tensors[name]
        end = offset + t.numel() * t.element_size()
        header[name] = {"dtype": _NAMES[t.dtype], "shape": list(t.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    digest, count = hashlib.sha256(), 0
    with _open(uri) as file:
        chunks: list[bytes | memoryview] = [struct.pack("<Q", len(text)), text]
        chunks += [_bytes(tensors[n]) for n in order]
        for chunk in chunks:
            file.write(chunk)
            digest.update(chunk)
            count += len(chunk)
    return FileInfo(digest.hexdigest(), count)


def _bytes(t: Tensor) -> memoryview:
    flat = t.detach().contiguous().reshape(-1)
    return memoryview(flat.view(torch.uint8).numpy() if flat.numel() else b"")  # type: ignore[arg-type]


@contextmanager
def _open(uri: str) -> Iterator[BinaryIO]:
    fs, path = storage.filesystem(uri)
    if storage.is_remote(uri):
        with fs.open_output_stream(path) as stream:
            yield cast(BinaryIO, stream)
        return
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with open(path, "wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
