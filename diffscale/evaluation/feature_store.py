"""Feature store: one Arrow file for each chunk of samples, memory-mapped, in sample order.

A chunk's file appears complete or not at all, so an interrupted evaluation resumes from the existing chunks. The order
is that of the samples, so results do not depend on who computed which chunk.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from diffscale.core import storage

CHUNK = re.compile(r"chunk-\d{9,18}-\d{9,18}\.arrow")


def write_chunk(folder: Path, first: int, columns: Mapping[str, NDArray], kept: str | None = None) -> None:
    """Write samples first … first+n−1 as `chunk-<first>-<end>.arrow`.

    columns: (n,d) float32, or (n,) int64 for labels.
    kept: URI of a folder in an object store that receives the file too; see `fetch_chunks`.
    """
    arrays = {}
    for name, values in columns.items():
        flat = pa.array(np.ascontiguousarray(values).reshape(-1))
        arrays[name] = flat if values.ndim == 1 else pa.FixedSizeListArray.from_arrays(flat, values.shape[1])
    table = pa.table(arrays)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=max(table.num_rows, 1))
    name = f"chunk-{first:09d}-{first + table.num_rows:09d}.arrow"
    data = sink.getvalue().to_pybytes()
    storage.write_bytes(str(folder / name), data)
    if kept is not None:
        storage.write_bytes(storage.join(kept, name), data)


def fetch_chunks(folder: Path, kept: str) -> None:
    """Copy the chunks that another machine has left in `kept`, and that the folder does not have."""
    for uri in storage.list_files(kept, ".arrow"):
        name = uri.rpartition("/")[2]
        if CHUNK.fullmatch(name) and not (folder / name).exists():
            storage.write_bytes(str(folder / name), storage.read_bytes(uri))


def chunks(folder: Path) -> dict[int, tuple[int, Path]]:
    """Return (end, file) of each existing chunk by its first sample; the longer of two with the same first sample."""
    found = {}
    for path in sorted(folder.glob("chunk-*.arrow")):
        first, end = (int(part) for part in path.stem.removeprefix("chunk-").split("-"))
        found[first] = (end, path)
    return found


def ends(folder: Path) -> dict[int, int]:
    """Return the end of each existing chunk by its first sample."""
    return {first: end for first, (end, _) in chunks(folder).items()}


class Column:
    """A column of a store as an array (n,d) or (n,) that is read from disk where it is accessed."""

    def __init__(self, parts: list[NDArray]) -> None:
        self._parts = parts
        self._starts = np.cumsum([0, *(len(p) for p in parts)])
        self.shape = (int(self._starts[-1]), *parts[0].shape[1:])
        self.dtype = parts[0].dtype

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, key: slice | NDArray) -> NDArray:
        """Return a copy of the rows start:stop, or of the rows with these indices."""
        if isinstance(key, slice):
            key = np.arange(*key.indices(len(self)))
        key = np.asarray(key)
        out = np.empty((len(key), *self.shape[1:]), self.dtype)
        part = np.searchsorted(self._starts, key, side="right") - 1
        for i in np.unique(part):
            rows = part == i
            out[rows] = self._parts[i][key[rows] - self._starts[i]]
        return out


class Rows:
    """Some rows of an array or `Column`, in any order, that are read where they are accessed."""

    def __init__(self, source: NDArray | Column, rows: NDArray) -> None:
        self._source, self._rows = source, rows
        self.shape = (len(rows), *source.shape[1:])
        self.dtype = source.dtype

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, key: slice | NDArray) -> NDArray:
        return self._source[self._rows[key]]


def select_rows(source: NDArray, rows: NDArray) -> NDArray:
    """Return the rows of features, without reading them yet."""
    return cast(NDArray, Rows(source, rows))


class FeatureStore:
    """The chunks of a folder, together: `store["features"]` is a `Column`.

    Raises FileNotFoundError if samples are missing (another process may have removed them).

    n: only the first n samples.
    """

    def __init__(self, folder: Path, n: int | None = None) -> None:
        files = chunks(folder)
        if not files:
            raise FileNotFoundError(f"{folder} holds no features")
        self.known: dict[Any, Any] = {}  # values that several metrics share
        self._columns: dict[str, list[NDArray]] = {}
        self.n = 0
        for first, (_, path) in files.items():
            if n is not None and first >= n:
                break
            if first != self.n:
                raise FileNotFoundError(f"{folder} lacks the features of samples {self.n} to {first - 1}")
            with pa.memory_map(str(path)) as source:
                table = pa.ipc.open_file(source).read_all()
            rows = table.num_rows if n is None else min(table.num_rows, n - first)
            self.n += rows
            for name in table.column_names:
                self._columns.setdefault(name, []).append(_view(table.column(name).chunk(0))[:rows])
        if self.n < (n or 0):
            raise FileNotFoundError(f"{folder} lacks the features of samples {self.n} to {n}")

    def __contains__(self, name: str) -> bool:
        return name in self._columns

    def __getitem__(self, name: str) -> NDArray:
        # A Column serves as an array: it has the length, shape and indexing that the metrics use.
        return cast(NDArray, Column(self._columns[name]))


def _view(array: pa.Array) -> NDArray:
    if isinstance(array, pa.FixedSizeListArray):
        return array.flatten().to_numpy(zero_copy_only=True).reshape(len(array), -1)
    return array.to_numpy(zero_copy_only=True)
