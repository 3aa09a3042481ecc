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
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from diffscale.core import storage
from diffscale.core.hashing import Digest
from diffscale.training.checkpoint.state import Slice, part_rows

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
GAP_BYTES = 64 << 10  # between two ranges that are read together
PIECE_BYTES = 32 << 20  # of a request: one stream does not saturate the connection to an object store
FETCHES = 8
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
    return {name: _write(storage.join(folder, name), kept, {SLICES: json.dumps(places)}, places)}


def read_group(
    folder: str, group: str, rows: Rows | None = None, *, files: Iterable[str] | None = None, staged: str | None = None
) -> dict[str, Tensor]:
    """Read the tensors of a group from its files. Raises CheckpointDamaged if no file is there.

    rows: (name, full shape) → first and last (exclusive) row to read; None for all rows. Files without such a row are
        not opened.
    files: names of the folder's files, if they are known
    staged: local folder with copies of some of the files
    """
    uris = group_files(folder, group, files)
    if not uris:
        raise CheckpointDamaged(f"{folder}: no tensors {group}")
    if staged is not None:
        uris = [copy if os.path.exists(copy := staged + uri.removeprefix(folder)) else uri for uri in uris]
    if rows is not None and len(uris) > 1:
        uris = _with_rows(uris, rows)
    parts: dict[str, list[tuple[int, Tensor]]] = {}
    for file in uris:
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


def group_files(folder: str, group: str, files: Iterable[str] | None = None) -> list[str]:
    """Return the URIs of a group's files; an empty list if it does not exist.

    files: names of the folder's files; None lists it
    """
    pattern = re.compile(re.escape(group) + r"(\.\d{5}-of-\d{5})?\.safetensors")
    if files is None:
        place = storage.join(folder, group).rpartition("/")[0]
        files = (uri.removeprefix(folder.removeprefix("file://") + "/") for uri in storage.list_files(place))
    return [storage.join(folder, name) for name in sorted(files) if pattern.fullmatch(name)]


def _with_rows(uris: list[str], rows: Rows) -> list[str]:
    """Return the files of a group that hold wanted rows: each rank wrote those of `part_rows`.

    The first one is always among them: it has the tensors that are not sliced.
    """
    wanted = {0}
    with _opened(uris[0]) as file:
        for name, (_, total) in _slices(file).items():
            shape = tuple(file.get_slice(name).get_shape())
            first, last = rows(name, (total, *shape[1:])) or (0, total)
            chunk = max(1, part_rows(total, 0, len(uris))[1])
            if first < last:
                wanted.update(range(first // chunk, min((last - 1) // chunk + 1, len(uris))))
    return [uris[i] for i in sorted(wanted)]


def _slices(file: Any) -> dict[str, tuple[int, int]]:
    """Return the first row in a file and the rows of the full tensor, for each sliced tensor."""
    places = json.loads((file.metadata() or {}).get(SLICES, "{}"))
    return {name: (int(start), int(total)) for name, (start, total) in places.items()}


def groups_in(folder: str) -> list[str]:
    """Return the names of the groups in a folder, without those in its sub-folders."""
    names = (f.rpartition("/")[2] for f in storage.list_files(folder, ".safetensors"))
    return sorted({re.sub(r"(\.\d{5}-of-\d{5})?\.safetensors$", "", name) for name in names})


def _read(uri: str, rows: Rows | None) -> dict[str, tuple[int, Tensor]]:
    """Read the requested rows of each tensor in a file; return the first row's index in the full tensor with each."""
    with _opened(uri) as file:
        places, wanted = _slices(file), {}
        for name in file.keys():  # noqa: SIM118
            shape = tuple(file.get_slice(name).get_shape())
            start, total = places.get(name, (0, shape[0] if shape else 0))
            asked = rows(name, (total, *shape[1:])) if rows and shape else None
            here = None if asked is None else tuple(min(max(row - start, 0), shape[0]) for row in asked)
            wanted[name] = start, here
        if isinstance(file, _Remote):
            file.fetch({name: here for name, (_, here) in wanted.items()})
        return {name: (start + (here or (0,))[0], _rows(file, name, here)) for name, (start, here) in wanted.items()}


def _rows(file: Any, name: str, rows: tuple[int, ...] | None) -> Tensor:
    """Return rows of a tensor in an open file; None for all of them."""
    if rows is None:
        return file.get_tensor(name)
    part = file.get_slice(name)
    some = rows[0] < rows[1] or isinstance(part, _RemoteTensor)  # safetensors does not slice nothing
    return part[rows[0] : rows[1]] if some else part[:1][:0]


@contextmanager
def _opened(uri: str) -> Iterator[Any]:
    """Open a file for reading; whatever is wrong with its content becomes CheckpointDamaged."""
    try:
        with _reader(uri) as file:
            yield file
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
    """A stand-in for safe_open on a file in an object store: tensors are fetched by their byte ranges."""

    def __init__(self, file: Any) -> None:
        self.file = file
        self.blocks: list[tuple[int, bytearray]] = []  # what `fetch` has read, and where it begins
        (length,) = struct.unpack("<Q", file.read_at(8, 0))
        if length > file.size() - 8:
            raise ValueError("the header is longer than the file")
        self.header: dict[str, Any] = json.loads(file.read_at(length, 8))
        self.start = 8 + length

    def fetch(self, wanted: Mapping[str, tuple[int, ...] | None]) -> None:
        """Read rows of many tensors, None for all of one: neighbours with one request, long ranges with several.

        A request takes 20 to 50 ms, and a model has a thousand tensors.
        """
        spans: list[tuple[int, int]] = []
        for begin, end in sorted(self.get_slice(name).span(rows) for name, rows in wanted.items()):
            if spans and begin - spans[-1][1] <= GAP_BYTES:
                spans[-1] = spans[-1][0], max(spans[-1][1], end)
            elif begin < end:
                spans.append((begin, end))
        self.blocks = [(begin, bytearray(end - begin)) for begin, end in spans]
        pieces = [(i, at) for i, (_, block) in enumerate(self.blocks) for at in range(0, len(block), PIECE_BYTES)]

        def read(piece: tuple[int, int]) -> None:
            (begin, block), at = self.blocks[piece[0]], piece[1]
            count = min(PIECE_BYTES, len(block) - at)
            block[at : at + count] = self.file.read_at(count, begin + at)

        with ThreadPoolExecutor(FETCHES, thread_name_prefix="checkpoint") as pool:
            list(pool.map(read, pieces))

    def read(self, begin: int, count: int) -> bytearray:
        """Return bytes of the file, those that `fetch` has read without a request."""
        for first, block in self.blocks:
            if first <= begin and begin + count <= first + len(block):
                return block[begin - first : begin - first + count]
        return bytearray(self.file.read_at(count, begin))

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

    def span(self, rows: tuple[int, ...] | None) -> tuple[int, int]:
        """Return where some rows, None for all, begin and end in the file."""
        first, last = rows or (0, self.shape[0] if self.shape else 1)
        start = self.of.start + self.begin
        return start + first * self.row_bytes, start + max(first, last) * self.row_bytes

    def __getitem__(self, rows: slice) -> Tensor:
        first, last, _ = rows.indices(self.shape[0] if self.shape else 1)
        begin, end = self.span((first, last))
        data = self.of.read(begin, end - begin) if begin < end else None
        flat = torch.frombuffer(data, dtype=self.dtype) if data else torch.empty(0, dtype=self.dtype)
        return flat.reshape([last - first, *self.shape[1:]] if self.shape else [])


def _write(uri: str, tensors: Mapping[str, Tensor], metadata: dict[str, str], last: Container[str] = ()) -> Digest:
    """Write the safetensors format (8 bytes length, JSON header, data) as a stream and return its digest.

    The stream holds no second copy of the tensors. The order is the library's: largest alignment first, then by name.

    last: names that come after others of the same alignment: every rank reads the others, which lie together
    """
    order = sorted(tensors, key=lambda n: (-tensors[n].element_size(), n in last, n))
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
