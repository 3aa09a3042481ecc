"""Labels in a column of a table: which values are classes, how often each occurs, and which rows have none.

A missing value, an empty text and -1 (the hub's sign for a split without labels) are no label. A column is read in
batches, and no more than MOST_CLASSES different values are held, whatever the file says.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

MOST_CLASSES = 100_000  # different values; more are ids or captions
MOST_CHARACTERS = 1000  # of one class name
NO_LABEL, NO_CLASS = -1, -2  # in place of a class number

Value = int | str | None


class LabelError(ValueError):
    """A column whose values are no classes; the text is the reason."""


@dataclass(frozen=True)
class Classes:
    """The classes of a column.

    names: in the order of the class numbers
    kind: what the column holds: the numbers of declared classes, or numbers or text that are the classes
    """

    names: tuple[str, ...]
    kind: Literal["declared", "numbers", "text"]

    @cached_property
    def _index(self) -> dict[str, int]:
        return {name: i for i, name in enumerate(self.names)}

    def number(self, value: Value) -> int:
        """Return the class number of a value, NO_LABEL or NO_CLASS."""
        if value is None or (isinstance(value, int) and value == NO_LABEL):
            return NO_LABEL
        if self.kind == "declared" and isinstance(value, int):
            return value if 0 <= value < len(self.names) else NO_CLASS
        return self._index.get(str(value), NO_CLASS)

    def numbers(self, column: pa.Array | pa.ChunkedArray) -> NDArray[np.int64]:
        """Return the class number of each row, NO_LABEL or NO_CLASS."""
        values, codes = distinct(column)
        return np.array([self.number(value) for value in values], np.int64)[codes]


@dataclass(frozen=True)
class SplitLabels:
    """The labels of a split.

    counts: rows of each class
    unlabelled: rows without a label
    unknown: rows whose label is none of the classes
    """

    counts: tuple[int, ...]
    unlabelled: int
    unknown: int

    @property
    def has_labels(self) -> bool:
        return any(self.counts) or self.unknown > 0


def is_label_type(kind: pa.DataType) -> bool:
    """Return whether values of an Arrow type can be labels: whole numbers, floats that may be whole, bool or text."""
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    kinds = (pa.types.is_integer, pa.types.is_floating, pa.types.is_boolean, pa.types.is_null)
    texts = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)
    return any(is_kind(kind) for is_kind in (*kinds, *texts))


def distinct(column: pa.Array | pa.ChunkedArray) -> tuple[list[Value], NDArray[np.int64]]:
    """Return the different values of a column, and the place of each row's value among them.

    Raises LabelError for floats that are not whole, longer text than a class name, or too many values.
    """
    column = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    column = column.chunk(0) if isinstance(column, pa.ChunkedArray) else column
    if pa.types.is_null(column.type):
        return [None], np.zeros(len(column), np.int64)
    if pa.types.is_float16(column.type):
        column = column.cast(pa.float32())
    if pa.types.is_string_view(column.type):
        column = column.cast(pa.large_string())
    coded = column if pa.types.is_dictionary(column.type) else column.dictionary_encode()
    places = coded.indices.cast(pa.int64()).fill_null(-1).to_numpy(zero_copy_only=False)
    used, codes = np.unique(places, return_inverse=True)
    if len(used) > MOST_CLASSES + 1:
        raise LabelError(f"there are more than {MOST_CLASSES:,} different values")
    found = coded.dictionary.take(pa.array(used[used >= 0]))
    if not pa.types.is_primitive(found.type) and (pc.max(pc.binary_length(found)).as_py() or 0) > 4 * MOST_CHARACTERS:
        raise LabelError(f"a value has more than {MOST_CHARACTERS:,} characters")
    values = [_value(value) for value in found.to_pylist()]
    return ([None] if len(used) and used[0] < 0 else []) + values, codes.astype(np.int64)


def _value(value: Any) -> Value:
    if isinstance(value, bool):
        return str(value)
    if isinstance(value, float):
        if value != value:  # NaN, as pandas writes a missing number
            return None
        if not value.is_integer():
            raise LabelError(f"{value:g} is not a whole number")
        return int(value)
    if isinstance(value, str) and len(value) > MOST_CHARACTERS:
        raise LabelError(f"a value has more than {MOST_CHARACTERS:,} characters")
    return value if value != "" else None


def count_values(batches: Iterable[pa.Array]) -> Counter[Value]:
    """Return how often each value occurs, None for missing ones. Raises LabelError."""
    counts: Counter[Value] = Counter()
    for batch in batches:
        values, codes = distinct(batch)
        for value, count in zip(values, np.bincount(codes, minlength=len(values)).tolist(), strict=True):
            counts[value] += count
        if len(counts) > MOST_CLASSES + 1:
            raise LabelError(f"there are more than {MOST_CLASSES:,} different values")
    return counts


def classes_of(counts: Sequence[Counter[Value]], names: tuple[str, ...] | None, chosen: bool) -> Classes:
    """Return the classes of all splits of a column.

    counts: of each split
    names: declared class names, or None: the different values are the classes, numbers in their order and text sorted
    chosen: whether a person named the column; otherwise numbers from MOST_CLASSES on are refused as ids

    Raises LabelError.
    """
    if names is not None:
        return Classes(names, "declared")
    values: set[Value] = set().union(*counts) - {None}
    if len(values) > MOST_CLASSES:
        raise LabelError(f"there are more than {MOST_CLASSES:,} different values")
    numbers = sorted(value for value in values if isinstance(value, int))
    texts = sorted(value for value in values if isinstance(value, str))
    if numbers and texts:
        raise LabelError(f"some files hold numbers ({numbers[0]}), others text ({texts[0]!r})")
    largest = max(map(abs, numbers), default=0)
    if largest >= MOST_CLASSES and not chosen:
        raise LabelError(
            f"{largest} looks like an id, not like a class; to take it for one, choose the column yourself"
        )
    for split in counts:
        if split[NO_LABEL] and len(split.keys() - {NO_LABEL, None}):
            raise LabelError(f"{split[NO_LABEL]:,} rows have the label -1, the hub's sign for none; others have one")
    if texts:
        return Classes(tuple(texts), "text")
    return Classes(tuple(str(number) for number in numbers if number != NO_LABEL), "numbers")


def labels_of_split(counts: Counter[Value], classes: Classes) -> SplitLabels:
    """Return how often each class occurs in a split, from how often each value does."""
    rows = dict.fromkeys(range(NO_CLASS, len(classes.names)), 0)
    for value, count in counts.items():
        rows[classes.number(value)] += count
    return SplitLabels(tuple(rows[i] for i in range(len(classes.names))), rows[NO_LABEL], rows[NO_CLASS])
