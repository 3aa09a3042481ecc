"""Reads Arrow and Parquet files of images in the layouts of Hugging Face `datasets`.

Known layouts: `save_to_disk` (state.json next to .arrow streams, or dataset_dict.json over several splits), the hub's
`data/train-00000-of-00002.parquet`, `train/0000.parquet`, and single files. The image column is a struct of bytes and
path, binary, or a fixed_shape_tensor.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import islice
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from diffscale.core import storage
from diffscale.core.errors import UserError
from diffscale.core.text import one_line
from diffscale.data.format.manifest import FILE
from diffscale.data.format.shard import Signature, signature

SPLIT_WORDS = re.compile(r"(?:^|[/._-])(train|validation|valid|val|dev|test)(?=$|[/._-])")


@dataclass(frozen=True)
class Columns:
    """Names of the columns. A string label becomes its index in `strings`."""

    image: str
    label: str | None
    strings: tuple[str, ...] | None = None


@dataclass(frozen=True)
class TablePart:
    """One file of a dataset.

    groups: rows of each row group (Parquet) or record batch (Arrow)
    split: `train` or `heldout`
    largest: bytes in memory of the largest group
    """

    uri: str
    groups: tuple[int, ...]
    split: str
    largest: int

    @property
    def rows(self) -> int:
        return sum(self.groups)

    def units(self, rows: int) -> Iterator[tuple[int, int]]:
        """Yield ranges (first, last) of about `rows` rows that end at ends of groups."""
        first = last = 0
        for group in self.groups:
            if last > first and last - first + group > rows:
                yield first, last
                first = last
            last += group
        if last > first:
            yield first, last


@dataclass(frozen=True)
class Tables:
    """The files of a dataset and the meaning of their columns.

    class_names: empty for data without labels
    latents: (dtype, channels, side) of a float tensor column, or None
    """

    parts: list[TablePart]
    columns: Columns
    class_names: list[str] = field(default_factory=list)
    latents: tuple[str, int, int] | None = None


def is_dataset(uri: str) -> bool:
    """Return whether a folder or file holds Arrow or Parquet and is not a dataset of our format."""
    if uri.endswith((".arrow", ".parquet")):
        return storage.exists(uri)
    return not storage.exists(storage.join(uri, FILE)) and bool(_files(uri))


def _files(uri: str) -> list[str]:
    if uri.endswith((".arrow", ".parquet")):
        return [uri]
    found = [f for f in storage.list_files(uri, recursive=True) if f.endswith((".arrow", ".parquet"))]
    return [f for f in found if not f.split("/")[-1].startswith("cache-")]  # written by `Dataset.map`


def open_tables(uri: str) -> Tables:
    """Open all files. Raises UserError if there is no column of images or a file cannot be read."""
    files = _files(uri)
    if not files:
        raise UserError(setting="data.path", value=uri, expected="Arrow or Parquet files of images")
    schema = _schema(files[0])
    features = _features(schema)
    image = _image_column(schema, features, files[0])
    label = _label_column(schema, features, image)
    parts = [_part(f, _split_of(f, uri)) for f in files]
    if not any(part.split == "train" for part in parts):  # train on the only split there is
        parts = [replace(part, split="train") for part in parts]
    names, strings = _classes(parts, label, features)
    return Tables(parts, Columns(image, label, strings), names, _latents(schema.field(image).type))


def _split_of(file: str, root: str) -> str:
    words = SPLIT_WORDS.findall(file.removeprefix(root.rstrip("/")) or file.split("/")[-1])
    return "train" if not words or words[-1] == "train" else "heldout"


def _features(schema: pa.Schema) -> dict[str, Any]:
    """Return the column features that `datasets` stores in the schema's metadata."""
    try:
        return json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
    except (KeyError, ValueError, TypeError):
        return {}


def _image_column(schema: pa.Schema, features: dict[str, Any], file: str) -> str:
    named = [c for c, f in features.items() if isinstance(f, dict) and f.get("_type") == "Image" and c in schema.names]
    usual = [c for c in ("image", "img", "latent", "latents", "pixels", "png", "jpg", "webp") if c in schema.names]
    for column in [*named, *usual, *schema.names]:
        kind = schema.field(column).type
        if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
            kind = kind.field("bytes").type
        if pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or isinstance(kind, pa.FixedShapeTensorType):
            return column
    raise UserError(
        setting="data.path", value=file, expected="a column of images", reason=f"its columns are {schema.names}"
    )


def _label_column(schema: pa.Schema, features: dict[str, Any], image: str) -> str | None:
    named = [
        c for c, f in features.items() if isinstance(f, dict) and f.get("_type") == "ClassLabel" and c in schema.names
    ]
    usual = [c for c in ("label", "labels", "class", "fine_label", "target") if c in schema.names]
    for column in [*named, *usual]:
        kind = schema.field(column).type
        if column != image and (
            pa.types.is_integer(kind) or pa.types.is_string(kind) or pa.types.is_large_string(kind)
        ):
            return column
    return None


def _classes(
    parts: list[TablePart], label: str | None, features: dict[str, Any]
) -> tuple[list[str], tuple[str, ...] | None]:
    if label is None:
        return [], None
    names = features.get(label, {}).get("names")
    if isinstance(names, list) and names:
        return [str(n) for n in names], None
    seen: set[Any] = set()
    for part in parts:
        for column in read_columns(part.uri, [label]):
            seen.update(pc.unique(column[label]).to_pylist())
    seen.discard(None)
    if all(isinstance(value, int) for value in seen):
        return [str(i) for i in range(max(seen, default=-1) + 1)], None
    strings = tuple(sorted(map(str, seen)))
    return list(strings), strings


def _latents(kind: pa.DataType) -> tuple[str, int, int] | None:
    if isinstance(kind, pa.FixedShapeTensorType) and pa.types.is_floating(kind.value_type) and len(kind.shape) == 3:
        return str(np.dtype(kind.value_type.to_pandas_dtype())), kind.shape[0], kind.shape[1]
    return None


def _schema(uri: str) -> pa.Schema:
    try:
        return pq.read_schema(_input(uri)) if uri.endswith(".parquet") else open_arrow(uri).schema
    except (pa.ArrowException, OSError, ValueError) as error:
        raise _damaged(uri, error) from None


def _part(uri: str, split: str) -> TablePart:
    sizes = group_sizes(uri)
    return TablePart(uri, tuple(rows for rows, _ in sizes), split, max((size for _, size in sizes), default=1))


def group_sizes(uri: str) -> list[tuple[int, int]]:
    """Return (rows, bytes in memory) of each row group or record batch. Raises UserError for an unreadable file."""
    try:
        if uri.endswith(".parquet"):
            meta = pq.read_metadata(_input(uri))
            groups = [meta.row_group(i) for i in range(meta.num_row_groups)]
            return [(group.num_rows, group.total_byte_size) for group in groups]
        return [(batch.num_rows, batch.nbytes) for batch in arrow_batches(uri)]
    except (pa.ArrowException, OSError, ValueError) as error:
        raise _damaged(uri, error) from None


def open_arrow(uri: str) -> pa.ipc.RecordBatchStreamReader | pa.ipc.RecordBatchFileReader:
    """Open a stream, as `datasets` writes, or a file; a local file is memory-mapped."""
    try:
        return pa.ipc.open_stream(_input(uri))
    except pa.ArrowInvalid:
        return pa.ipc.open_file(_input(uri))


@lru_cache(maxsize=256)
def _mapped(uri: str, state: Signature) -> list[pa.RecordBatch]:
    """Return all batches of a local file in this state: views of its memory map, found once."""
    return list(arrow_batches(uri))


def arrow_batches(uri: str) -> Iterator[pa.RecordBatch]:
    """Yield the record batches of a stream or file."""
    reader = open_arrow(uri)
    if isinstance(reader, pa.ipc.RecordBatchFileReader):
        for i in range(reader.num_record_batches):
            yield reader.get_batch(i)
    else:
        yield from reader


def read_columns(uri: str, columns: list[str]) -> Iterator[pa.RecordBatch | pa.Table]:
    """Yield the file's groups in order, these columns only."""
    if uri.endswith(".parquet"):
        file = pq.ParquetFile(_input(uri))
        for group in range(file.num_row_groups):
            yield file.read_row_group(group, columns=columns)
    else:
        for batch in arrow_batches(uri):
            yield batch.select(columns)


def read_group(uri: str, group: int, columns: list[str]) -> pa.Table:
    """Return one group of the file, these columns only, as a table of one chunk with validated offsets.

    Raises UserError for a damaged file.
    """
    try:
        table = _read_group(uri, group, columns)
        table.validate(full=True)  # Arrow trusts the offsets in a file: a wrong one would crash the process
    except (pa.ArrowException, OSError) as error:
        raise _damaged(uri, error) from None
    return table


def _read_group(uri: str, group: int, columns: list[str]) -> pa.Table:
    if uri.endswith(".parquet"):
        return pq.ParquetFile(_input(uri)).read_row_group(group, columns=columns)
    batch = (
        _mapped(uri, signature(uri))[group]
        if not storage.is_remote(uri)
        else next(islice(arrow_batches(uri), group, None))
    )
    return pa.Table.from_batches([batch.select(columns)])


def image_bytes(column: Any, row: int) -> Any:
    """Return the encoded image as a buffer, the array of a tensor column, or None for a row without bytes."""
    if isinstance(column.type, pa.FixedShapeTensorType):
        return column[row].to_numpy() if column[row].is_valid else None
    value = column[row]
    if pa.types.is_struct(column.type):
        value = value["bytes"] if value.is_valid else None
    return value.as_buffer() if value is not None and value.is_valid else None


def is_mapped(uri: str) -> bool:
    """Return whether rows are read through a memory map (local Arrow); otherwise a whole group is held in memory."""
    return uri.endswith(".arrow") and not storage.is_remote(uri)


def _input(uri: str) -> Any:
    if not storage.is_remote(uri):
        return pa.memory_map(uri.removeprefix("file://"))
    fs, path = storage.filesystem(uri)
    return fs.open_input_file(path)


def _damaged(uri: str, error: Exception) -> UserError:
    return UserError(
        setting="data.path", value=uri, expected="a readable Arrow or Parquet file", reason=one_line(error)
    )
