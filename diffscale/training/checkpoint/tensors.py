"""Groups of named tensors in safetensors files, one file or one per rank; read without pickle, checked by SHA-256.

A group NAME is `NAME.safetensors`, or `NAME.00000-of-00004.safetensors` and so on. Each tensor there is a slice of
rows, and the file's header holds the first row of each. Any number of readers can read any rows.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import struct
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from diffscale.core import storage
from diffscale.core.hashing import Digest
from diffscale.training.checkpoint.state import Slice

_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
SLICES = "slices"
Rows = Callable[[str, tuple[int, ...]], tuple[int, int] | None]


class CheckpointDamaged(Exception):
    """A file of a checkpoint is missing, short or altered."""


def write_group(
    folder: str, group: str, tensors: Mapping[str, Tensor], slices: Mapping[str, Slice | None], rank: int, size: int
) -> dict[str, Digest]:
    """Write this rank's file of a group and return its name and digest.

    Rank 0 alone writes tensors that are not sliced. With one rank or no slices the group is one plain file.

    tensors: the rows that this rank holds, on the CPU
    slices: place of those rows in the full tensor; None for a full tensor
    """
    if not any(slices.get(name) for name in tensors) and size > 1:
        size = 1
        if rank:
            return {}
    name = f"{group}.safetensors" if size == 1 else f"{group}.{rank:05d}-of-{size:05d}.safetensors"
    kept = {n: t for n, t in tensors.items() if rank == 0 or slices.get(n)}
    places = {n: list(s) for n in sorted(kept) if (s := slices.get(n)) is not None}  # equal states are equal files
    return {name: _write(storage.join(folder, name), kept, {SLICES: json.dumps(places)})}


def read_group(folder: str, group: str, rows: Rows | None = None) -> dict[str, Tensor]:
    """Read the tensors of a group from all its files. Raises CheckpointDamaged if no file is there.

    rows: (name, full shape) → first and last (exclusive) row to read; None for all rows
    """
    files = group_files(folder, group)
    if not files:
        raise CheckpointDamaged(f"{folder}: no tensors {group}")
    parts: dict[str, list[tuple[int, Tensor]]] = {}
    for file in files:
        for name, (start, tensor) in _read(file, rows).items():
            parts.setdefault(name, []).append((start, tensor))
    out = {}
    for name, pieces in parts.items():
        pieces.sort(key=lambda piece: piece[0])
        try:
            out[name] = pieces[0][1] if len(pieces) == 1 else torch.cat([t for _, t in pieces])
        except RuntimeError as error:
            raise CheckpointDamaged(f"{folder}: slices of {name} do not fit: {error}") from None
    return out


def group_files(folder: str, group: str) -> list[str]:
    """Return the URIs of a group's files; an empty list if it does not exist."""
    parent, _, base = group.rpartition("/")
    place = storage.join(folder, parent) if parent else folder
    pattern = re.compile(re.escape(base) + r"(\.\d{5}-of-\d{5})?\.safetensors")
    return [f for f in storage.list_files(place, ".safetensors") if pattern.fullmatch(f.rpartition("/")[2])]


def groups_in(folder: str) -> list[str]:
    """Return the names of the groups in a folder, without those in its sub-folders."""
    names = (f.rpartition("/")[2] for f in storage.list_files(folder, ".safetensors"))
    return sorted({re.sub(r"(\.\d{5}-of-\d{5})?\.safetensors$", "", name) for name in names})


def _read(uri: str, rows: Rows | None) -> dict[str, tuple[int, Tensor]]:
    """Read the requested rows of each tensor in a file; return the first row's index in the full tensor with each."""
    out = {}
    try:
        with _reader(uri) as file:
            places = json.loads((file.metadata() or {}).get(SLICES, "{}"))
            for name in file.keys():  # noqa: SIM118
                part = file.get_slice(name)
                shape = tuple(part.get_shape())
                start, total = (int(n) for n in places.get(name, (0, shape[0] if shape else 0)))
                wanted = rows(name, (total, *shape[1:])) if rows and shape else None
                if wanted is None:
                    out[name] = start, file.get_tensor(name)
                    continue
                first, last = (min(max(row - start, 0), shape[0]) for row in wanted)
                out[name] = start + first, part[first:last] if first < last else part[:1][:0]
        return out
    except (
        SafetensorError,
        OSError,
        ValueError,
        struct.error,
        TypeError,
        AttributeError,
        LookupError,
        RecursionError,
        RuntimeError,
        OverflowError,
    ) as error:
        raise CheckpointDamaged(f"{uri}: {error}") from None


@contextmanager
def _reader(uri: str) -> Iterator[Any]:
    if not storage.is_remote(uri):
        with safe_open(uri.removeprefix("file://"), framework="pt") as local:
            yield local
        return
    fs, path = storage.filesystem(uri)
    with fs.open_input_file(path) as file:
        yield _Remote(file)


class _Remote:
    """A stand-in for safe_open on a file in an object store: each tensor is fetched by its byte range."""

    def __init__(self, file: Any) -> None:
        self.file = file
        (length,) = struct.unpack("<Q", file.read_at(8, 0))
        if length > file.size() - 8:
            raise ValueError("the header is longer than the file")
        self.header: dict[str, Any] = json.loads(file.read_at(length, 8))
        self.start = 8 + length

    def metadata(self) -> dict[str, str] | None:
        return self.header.get("__metadata__")

    def keys(self) -> list[str]:
        return [name for name in self.header if name != "__metadata__"]

    def get_tensor(self, name: str) -> Tensor:
        return self.get_slice(name)[:]

    def get_slice(self, name: str) -> _RemoteTensor:
        return _RemoteTensor(self, self.header[name])


class _RemoteTensor:
    def __init__(self, of: _Remote, entry: dict[str, Any]) -> None:
        self.of, self.shape = of, [int(n) for n in entry["shape"]]
        self.dtype = {name: dtype for dtype, name in _NAMES.items()}[entry["dtype"]]
        self.begin, end = (int(n) for n in entry["data_offsets"])
        self.row_bytes = math.prod(self.shape[1:]) * self.dtype.itemsize
        if end - self.begin != math.prod(self.shape) * self.dtype.itemsize or min(self.shape, default=0) < 0:
            raise ValueError(f"shape {self.shape} in {end - self.begin} bytes")

    def get_shape(self) -> list[int]:
        return self.shape

    def __getitem__(self, rows: slice) -> Tensor:
        first, last, _ = rows.indices(self.shape[0] if self.shape else 1)
        data = self.of.file.read_at(
            (last - first) * self.row_bytes, self.of.start + self.begin + first * self.row_bytes
        )
        flat = torch.frombuffer(bytearray(data), dtype=self.dtype) if data else torch.empty(0, dtype=self.dtype)
        return flat.reshape([last - first, *self.shape[1:]] if self.shape else [])


def _write(uri: str, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> Digest:
    """Write the safetensors format (8 bytes length, JSON header, data) as a stream and return its digest.

    The stream holds no second copy of the tensors. The order is the library's: largest alignment first, then by name.
    """
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
    return Digest(digest.hexdigest(), count)


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
