"""Reading the images of one unit of work: (name, encoded bytes or array, label), or why a name gives none."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import numpy as np

from diffscale.core import storage
from diffscale.data.build.decode import MOST_BYTES, Unusable
from diffscale.data.build.sources import Item, Label, Unit, open_file
from diffscale.data.format import hf_tables as tables

Sample = tuple[str, Any, Label]


def read_unit(unit: Unit) -> Iterator[Sample | tuple[str, Unusable, None]]:
    """Each image of the unit in order. Data is bytes-like, or an array (H, W[, C]) uint8 or (C, H, W) floats."""
    if unit.reader == "table":
        yield from _read_table(unit)
    elif unit.reader == "array":
        yield from _read_array(unit)
    else:
        read = {"files": _read_file, "zip": _read_member, "tar": _read_span}[unit.reader]
        for item in unit.items:
            try:
                yield item.name, read(unit, item), item.label
            except (OSError, zipfile.BadZipFile, KeyError, RuntimeError, NotImplementedError, EOFError) as error:
                yield item.name, Unusable(f"cannot be read ({str(error).splitlines()[0][:160]})"), None
            except Unusable as error:
                yield item.name, error, None


def _read_file(unit: Unit, item: Item) -> bytes:
    fs, path = storage.filesystem(item.where)
    if fs.get_file_info(path).size > MOST_BYTES:
        raise Unusable(f"the file has more than {MOST_BYTES:,} bytes")
    with fs.open_input_stream(path) as file:
        return file.read()


@lru_cache(maxsize=1)
def _zip(uri: str) -> zipfile.ZipFile:
    return zipfile.ZipFile(open_file(uri))


def _read_member(unit: Unit, item: Item) -> bytes:
    archive = _zip(unit.uri)
    info = archive.getinfo(item.where)
    if info.file_size > MOST_BYTES:
        raise Unusable(f"the file has more than {MOST_BYTES:,} bytes")
    with archive.open(info) as file:
        return file.read(MOST_BYTES + 1)


@lru_cache(maxsize=1)
def _tar(uri: str) -> Any:
    return open_file(uri)


def _read_span(unit: Unit, item: Item) -> bytes:
    offset, size = item.where
    if size > MOST_BYTES:
        raise Unusable(f"the file has more than {MOST_BYTES:,} bytes")
    file = _tar(unit.uri)
    file.seek(offset)
    data = file.read(size)
    if len(data) != size:
        raise Unusable("the archive ends inside it")
    return data


def _read_table(unit: Unit) -> Iterator[Sample | tuple[str, Unusable, None]]:
    assert unit.rows is not None
    columns = tables.Columns(**unit.extra["columns"])
    numbers = {s: i for i, s in enumerate(columns.strings or ())}
    wanted = [columns.image] + ([columns.label] if columns.label else [])
    file, row = unit.uri.split("/")[-1], 0
    for group, (count, _) in enumerate(tables.group_sizes(unit.uri)):
        if row + count > unit.rows[0] and row < unit.rows[1]:
            table = tables.read_group(unit.uri, group, wanted).combine_chunks()
            images = table[columns.image].combine_chunks()
            labels = table[columns.label].to_pylist() if columns.label else [None] * count
            for i in range(max(0, unit.rows[0] - row), min(count, unit.rows[1] - row)):
                name, data = f"{file}:{row + i}", tables.image_bytes(images, i)
                if data is None:
                    yield name, Unusable("the row has no image bytes"), None
                elif columns.label and labels[i] is None:
                    yield name, Unusable("the row has no label"), None
                else:
                    yield name, data, numbers.get(str(labels[i]), labels[i])
        row += count


def _read_array(unit: Unit) -> Iterator[Sample]:
    assert unit.rows is not None
    images = np.load(unit.uri, mmap_mode="r", allow_pickle=False)
    labels = unit.extra["labels"] and np.load(unit.extra["labels"], mmap_mode="r", allow_pickle=False)
    for row in range(*unit.rows):
        yield str(row), images[row], None if labels is None else int(labels[row])
