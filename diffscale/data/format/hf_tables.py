"""Reads Arrow and Parquet files of images in the layouts of Hugging Face `datasets`.

The image column is a struct of bytes and path, binary, or a fixed_shape_tensor. Labels are established on all rows when
a dataset is opened: which classes there are, how often each occurs, and whether rows have none.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import islice
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from diffscale.core import storage
from diffscale.core.errors import UserError
from diffscale.core.text import one_line
from diffscale.data.format import hf_columns
from diffscale.data.format.hf_choices import NONE, Choices
from diffscale.data.format.hf_columns import Columns
from diffscale.data.format.hf_files import TableFile, find_files, is_dataset, roles
from diffscale.data.format.hf_labels import (
    MOST_CHARACTERS,
    MOST_CLASSES,
    Classes,
    LabelError,
    SplitLabels,
    Value,
    classes_of,
    count_values,
    labels_of_split,
)
from diffscale.data.format.manifest import SplitName
from diffscale.data.format.shard import Signature, signature

__all__ = ["Choices", "Columns", "TablePart", "Tables", "is_dataset", "open_tables"]

Result = TypeVar("Result")
LABEL_ROWS = 8192  # rows of which labels are read at once
MOST_LABEL_BYTES = 64 << 20  # of the labels of one row group, beyond MOST_CHARACTERS for each row
NO_CLASSES = Classes((), "text")
CONNECTIONS = 8  # files opened at once: one after the other does not saturate the connection to an object store


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

    schema: of the first file
    classes: empty names for data without labels
    labels: of `train` and `heldout`; only of those with labels
    latents: (dtype, channels, side) of a float tensor column, or None
    left_out: (file, reason) of the files that are not used
    """

    schema: pa.Schema
    parts: list[TablePart]
    columns: Columns
    classes: Classes = NO_CLASSES
    labels: dict[str, SplitLabels] = field(default_factory=dict)
    latents: tuple[str, int, int] | None = None
    left_out: list[tuple[str, str]] = field(default_factory=list)


def open_tables(uri: str, choices: Choices | None = None) -> Tables:
    """Open all files of a dataset.

    Raises UserError for a file that cannot be read, for files that do not fit together, and where a configuration, the
    column of images or that of labels is not decided by the files nor by `choices`. A training split without any label
    makes a dataset without classes; a held-out one without any is kept without labels, unless another one has them.
    """
    choices = choices or Choices()
    files, left_out = find_files(uri, choices)
    used = roles(files, uri, choices)
    left_out += [(f.uri, f"its split {f.split or '(no name)'} is not used") for f in files if f.split not in used]
    files = [file for file in files if file.split in used]
    opened = list(_in_order(_open_file, [file.uri for file in files]))
    schemas = [(file.uri, schema) for file, (schema, _) in zip(files, opened, strict=True)]
    schema = schemas[0][1]
    image = hf_columns.image_column(schema, choices, files[0].uri)
    label = hf_columns.label_column(schema, choices, image)
    hf_columns.check_alike(schemas, Columns(image, label), choices)
    parts = [
        TablePart(file.uri, tuple(n for n, _ in sizes), used[file.split], max((size for _, size in sizes), default=1))
        for file, (_, sizes) in zip(files, opened, strict=True)
    ]
    classes = NO_CLASSES
    labels: dict[str, SplitLabels] = {}
    if label is not None:
        declared = (hf_columns.declared_names(schema, label, place) for place, schema in schemas)
        names = next((found for found in declared if found), None)
        classes, by_split = _understand(files, uri, label, names, choices)
        labels, without = _by_role(by_split, used)
        if "train" not in labels and choices.label_column is not None:
            raise _no_classes(label, uri, LabelError("no training image has a label"), choices)
        if "train" not in labels:
            classes, labels, label = NO_CLASSES, {}, None
        else:
            dropped = {file.uri for file in files if file.split in without}
            left_out += [(place, "its rows have no labels, those of other splits do") for place in sorted(dropped)]
            parts = [part for part in parts if part.uri not in dropped]
    root = uri.rstrip("/") + "/"
    return Tables(
        schema,
        parts,
        Columns(image, label, classes.kind == "declared"),
        classes,
        labels,
        hf_columns.latents_of(schema.field(image).type),
        [(place.removeprefix(root), reason) for place, reason in left_out],
    )


def _understand(
    files: list[TableFile], uri: str, label: str, names: tuple[str, ...] | None, choices: Choices
) -> tuple[Classes, dict[str, SplitLabels]]:
    """Return the classes of a column, and the labels of each split of the source, from all rows."""
    counts = _count(files, label, choices)
    try:
        classes = classes_of(list(counts.values()), names, choices.label_column is not None)
    except LabelError as error:
        raise _no_classes(label, uri, error, choices) from None
    return classes, {split: labels_of_split(found, classes) for split, found in counts.items()}


def _by_role(by_split: dict[str, SplitLabels], used: dict[str, SplitName]) -> tuple[dict[str, SplitLabels], set[str]]:
    """Return the labels of `train` and `heldout`, and the splits without labels next to others of their role.

    ImageNet's validation images have labels, its test images have none.
    """
    labels: dict[str, SplitLabels] = {}
    without: set[str] = set()
    for role in ("train", "heldout"):
        splits = [split for split in by_split if used[split] == role]
        labelled = [split for split in splits if by_split[split].has_labels]
        if labelled:
            labels[role] = _sum([by_split[split] for split in labelled])
            without |= set(splits) - set(labelled)
    return labels, without


def _sum(labels: list[SplitLabels]) -> SplitLabels:
    counts = tuple(map(sum, zip(*(found.counts for found in labels), strict=True)))
    return SplitLabels(counts, sum(found.unlabelled for found in labels), sum(found.unknown for found in labels))


def _in_order(work: Callable[[str], Result], uris: list[str]) -> Iterator[Result]:
    """Yield the result for each file, computed for several remote ones at once."""
    if not any(storage.is_remote(uri) for uri in uris):
        yield from map(work, uris)
        return
    with ThreadPoolExecutor(CONNECTIONS, thread_name_prefix="diffscale-open") as pool:
        for first in range(0, len(uris), CONNECTIONS):
            yield from pool.map(work, uris[first : first + CONNECTIONS])


def _open_file(uri: str) -> tuple[pa.Schema, list[tuple[int, int]]]:
    try:
        schema = pq.read_schema(_input(uri)) if uri.endswith(".parquet") else open_arrow(uri).schema
    except (pa.ArrowException, OSError, ValueError) as error:
        raise _damaged(uri, error) from None
    return schema, group_sizes(uri)


def _count(files: list[TableFile], label: str, choices: Choices) -> dict[str, Counter[Value]]:
    """Return how often each value of a column of labels occurs in each split of the source."""
    counts: dict[str, Counter[Value]] = {}

    def count(uri: str) -> Counter[Value]:
        try:
            return count_values(_label_batches(uri, label))
        except LabelError as error:
            raise _no_classes(label, uri, error, choices) from None
        except (pa.ArrowException, OSError) as error:
            raise _damaged(uri, error) from None

    for file, found in zip(files, _in_order(count, [file.uri for file in files]), strict=True):
        counts.setdefault(file.split, Counter()).update(found)
        if len(counts[file.split]) > MOST_CLASSES + 2:
            raise _no_classes(label, file.uri, LabelError(f"more than {MOST_CLASSES:,} different values"), choices)
    return counts


def _no_classes(label: str, uri: str, error: LabelError, choices: Choices) -> UserError:
    spelled = choices.option("label_column") + (" " if choices.command else "=")
    return UserError(
        setting=choices.option("label_column"),
        value=label,
        expected="a column of classes",
        reason=f"{uri.rsplit('/', 1)[-1]}: {error}",
        fix=f"choose another column, or {spelled}{NONE} for images without classes",
    )


def _label_batches(uri: str, label: str) -> Iterator[pa.Array]:
    """Yield the labels of a file a few thousand rows at a time; text is not expanded, however often it repeats."""
    if not uri.endswith(".parquet"):
        place = open_arrow(uri).schema.get_field_index(label)
        for batch in arrow_batches(uri, [place]):
            column = batch.column(label)
            column.validate(full=True)  # Arrow trusts the offsets in a file: a wrong one would crash the process
            for first in range(0, len(column), LABEL_ROWS):
                yield column.slice(first, LABEL_ROWS)
        return
    file = pq.ParquetFile(_input(uri), read_dictionary=[label], pre_buffer=storage.is_remote(uri))
    meta = file.metadata
    place = file.schema_arrow.get_field_index(label)
    places = [i for i in range(meta.num_columns) if meta.schema.column(i).path == label] or [place]
    for group in range(meta.num_row_groups):
        rows = meta.row_group(group)
        if rows.column(places[0]).total_uncompressed_size > MOST_LABEL_BYTES + 4 * MOST_CHARACTERS * rows.num_rows:
            raise LabelError(f"its values have more than {MOST_CHARACTERS:,} characters on average")
    for batch in file.iter_batches(LABEL_ROWS, columns=[label]):
        yield batch.column(0)


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


def open_arrow(
    uri: str, columns: list[int] | None = None
) -> pa.ipc.RecordBatchStreamReader | pa.ipc.RecordBatchFileReader:
    """Open a stream, as `datasets` writes, or a file; a local file is memory-mapped.

    columns: places of the columns to read; None for all
    """
    options = pa.ipc.IpcReadOptions(included_fields=columns)
    try:
        return pa.ipc.open_stream(_input(uri), options=options)
    except pa.ArrowInvalid:
        return pa.ipc.open_file(_input(uri), options=options)


@lru_cache(maxsize=256)
def _mapped(uri: str, state: Signature) -> list[pa.RecordBatch]:
    """Return all batches of a local file in this state: views of its memory map, found once."""
    return list(arrow_batches(uri))


def arrow_batches(uri: str, columns: list[int] | None = None) -> Iterator[pa.RecordBatch]:
    """Yield the record batches of a stream or file; see `open_arrow`."""
    reader = open_arrow(uri, columns)
    if isinstance(reader, pa.ipc.RecordBatchFileReader):
        for i in range(reader.num_record_batches):
            yield reader.get_batch(i)
    else:
        yield from reader


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
        text = columns[1:]  # labels that repeat are not expanded
        return pq.ParquetFile(_input(uri), read_dictionary=text).read_row_group(group, columns=columns)
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
