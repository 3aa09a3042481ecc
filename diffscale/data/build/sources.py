"""The sources of a build: each kind lists its images as units of work in a fixed order, and reads a unit.

No file is extracted under a name from an archive, and nothing is unpickled.
"""

from __future__ import annotations

import csv
import io
import json
import zipfile
from collections.abc import Iterable, Iterator
from functools import lru_cache
from itertools import groupby, islice
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from pyarrow import fs as pafs

from diffscale.core import storage
from diffscale.core.errors import UserError
from diffscale.core.text import one_line
from diffscale.data.build import array_sources, table_sources
from diffscale.data.build.decode import MOST_BYTES, ImageError
from diffscale.data.build.items import (
    MISSING,
    BuildSource,
    Item,
    Kind,
    Reader,
    Reading,
    Sample,
    SourceUnit,
    check_size,
    is_image,
    label_of,
    open_file,
    refuse,
    unreadable,
)
from diffscale.data.build.webdataset import read_span, tar_items
from diffscale.data.format import hf_tables

SPLIT_FOLDERS = {"train": "train", "val": "heldout", "valid": "heldout", "validation": "heldout", "test": "heldout"}


def open_source(uri: str, rows: int, work: Path, reading: Reading) -> BuildSource:
    """List a source. Raises UserError for one that is missing, has no images or is of no known kind.

    uri: local path or URI
    rows: images of a unit
    work: local folder for unpacked archives and arrays
    reading: a person's choices; the kind `auto` is decided by the file's name and the folder's content
    """
    fs, path = storage.filesystem(uri)
    info = fs.get_file_info(path)
    if info.type == pafs.FileType.NotFound:
        raise UserError(
            setting="SOURCE", value=uri, expected="a folder, an archive or a file", reason="it does not exist"
        )
    chosen = guess_kind(uri, info) if reading.kind == "auto" else reading.kind
    given = read_labels(reading.labels) if reading.labels else None
    source = BuildSource(chosen, iter(()), work=work)
    if chosen in ("array", "cifar10"):
        found = array_sources.open_cifar10(uri, work) if chosen == "cifar10" else array_sources.open_arrays(uri, work)
        source.units = (
            SourceUnit(
                "array", a.images, rows=(first, min(first + rows, a.n)), split=a.split, extra={"labels": a.labels}
            )
            for a in found
            for first in range(0, a.n, rows)
        )
        source.class_names, source.latents = found[0].class_names, found[0].latents
    elif chosen == "table":
        table_sources.open_table(uri, rows, reading, source)
    else:
        readers: dict[str, tuple[Any, Reader]]
        readers = {"folder": (folder_items, "files"), "zip": (zip_items, "zip"), "tar": (tar_items, "tar")}
        items, reader = readers[chosen]
        source.units = _in_units(items(uri, source, given), rows, reader)
    return source


def guess_kind(uri: str, info: pafs.FileInfo) -> Kind:
    """Return the kind of a source by the file's name or the folder's content."""
    name = uri.lower()
    if info.type == pafs.FileType.Directory:
        names = [f.split("/")[-1] for f in storage.list_files(uri)]
        if hf_tables.is_dataset(uri):
            return "table"
        if any(n.endswith("_batch.bin") or n.startswith("data_batch_") for n in names):
            return "cifar10"
        if any(n.endswith(".tar") for n in names):
            return "tar"
        if any(n.endswith((".npz", ".npy")) for n in names):
            return "array"
        return "folder"
    if array_sources.looks_like_cifar10(name.split("/")[-1]):
        return "cifar10"
    for ends, kind in (
        ((".zip",), "zip"),
        ((".tar", ".tar.gz", ".tgz"), "tar"),
        ((".npz", ".npy"), "array"),
        ((".parquet", ".arrow"), "table"),
    ):
        if name.endswith(ends):
            return kind  # type: ignore[return-value]
    raise UserError(
        setting="SOURCE",
        value=uri,
        expected="a folder of images, .zip, .tar (WebDataset), .parquet, .arrow, .npz, .npy or CIFAR-10's archive",
    )


def read_labels(uri: str) -> dict[str, str]:
    """Return {file: label} of a CSV with two columns; a first line `file,label` is a header."""
    try:
        rows = [row for row in csv.reader(io.StringIO(storage.read_bytes(uri).decode("utf-8-sig"))) if row]
    except (FileNotFoundError, UnicodeDecodeError) as error:
        raise UserError(setting="--labels", value=uri, expected="a CSV of file,label", reason=one_line(error)) from None
    bad = next((row for row in rows if len(row) < 2), None)
    if not rows or bad:
        raise UserError(
            setting="--labels",
            value=uri,
            expected="two columns, file and label, in every line",
            reason=f"a line is {bad}" if bad else "the file is empty",
        )
    start = 1 if rows[0][0].strip().lower() in ("file", "filename", "path", "name", "image") else 0
    return {row[0].strip(): row[1].strip() for row in rows[start:]}


def folder_items(uri: str, source: BuildSource, given: dict[str, str] | None) -> Iterator[tuple[str, str | None, Item]]:
    """Yield (uri, split, item) of each image under a folder; the class is the first folder, below train/ and val/."""
    fs, root = storage.filesystem(uri)
    scheme = uri.split("://")[0] + "://" if storage.is_remote(uri) else ""
    files = _files_of_bucket(fs, root)
    if files is None:
        top = {i.base_name for i in fs.get_file_info(pafs.FileSelector(root)) if i.type == pafs.FileType.Directory}
    else:
        top = {parts[0] for parts in files if len(parts) > 1}
    by_split = "train" in top and top <= set(SPLIT_FOLDERS)
    if given is None and "dataset.json" in {i.base_name for i in fs.get_file_info(pafs.FileSelector(root))}:
        given = _edm_labels(storage.read_bytes(storage.join(uri, "dataset.json")), uri)
    for path in _walk(fs, root) if files is None else (f"{root.rstrip('/')}/{'/'.join(parts)}" for parts in files):
        name = path[len(root.rstrip("/")) + 1 :]
        parts = PurePosixPath(name).parts
        split = SPLIT_FOLDERS[parts[0]] if by_split else None
        inner = parts[1:] if by_split else parts
        label = label_of(name, inner, given, source)
        if label is not MISSING:
            yield uri, split, Item(name, scheme + path, label)


def _walk(fs: pafs.FileSystem, folder: str) -> Iterator[str]:
    """Yield the images under a folder in the order of their names, with one folder in memory at a time."""
    infos = sorted(fs.get_file_info(pafs.FileSelector(folder)), key=lambda i: i.base_name)
    for info in infos:
        if info.type == pafs.FileType.File and is_image(info.base_name):
            yield info.path
    for info in infos:
        if info.type == pafs.FileType.Directory and not info.base_name.startswith("."):
            yield from _walk(fs, info.path)


def _files_of_bucket(fs: pafs.FileSystem, root: str) -> list[tuple[str, ...]] | None:
    """Return the parts of each image's path under a prefix of gs://, in `_walk`'s order; None for other file systems.

    Google's objects are not in folders, so pyarrow finds only folders that were created explicitly.
    """
    if not isinstance(fs, pafs.GcsFileSystem):
        return None
    infos = fs.get_file_info(pafs.FileSelector(root, recursive=True))
    names = [PurePosixPath(i.path[len(root.rstrip("/")) + 1 :]).parts for i in infos if i.type == pafs.FileType.File]
    names = [parts for parts in names if is_image(parts[-1]) and not any(p.startswith(".") for p in parts[:-1])]
    return sorted(names, key=lambda parts: [*((True, p) for p in parts[:-1]), (False, parts[-1])])


def zip_items(uri: str, source: BuildSource, given: dict[str, str] | None) -> Iterator[tuple[str, str | None, Item]]:
    try:
        archive = zipfile.ZipFile(open_file(uri))
    except (zipfile.BadZipFile, OSError) as error:
        raise unreadable(uri, "a zip archive", error) from None
    with archive:
        members = sorted((m for m in archive.infolist() if not m.is_dir()), key=lambda m: m.filename)
        labels = next((m for m in members if m.filename == "dataset.json"), None)
        if given is None and labels is not None and labels.file_size < 1 << 30:
            given = _edm_labels(archive.read(labels), uri)
        for member in members:
            if not is_image(member.filename) or refuse(member.filename, member.orig_filename, source):
                continue
            label = label_of(member.filename, PurePosixPath(member.filename).parts, given, source)
            if label is not MISSING:
                yield uri, None, Item(member.filename, member.filename, label)


def _edm_labels(data: bytes, uri: str) -> dict[str, str] | None:
    """Return the labels in a dataset.json of StyleGAN or EDM: {"labels": [[file, class], ...]} or {"labels": null}."""
    try:
        pairs = json.loads(data)["labels"]
        return None if pairs is None else {str(file): str(int(label)) for file, label in pairs}
    except (ValueError, KeyError, TypeError) as error:
        raise unreadable(f"{uri}/dataset.json", '"labels": [[file, class], ...]', error) from None


def _in_units(entries: Iterable[tuple[str, str | None, Item]], rows: int, reader: Reader) -> Iterator[SourceUnit]:
    for (uri, split), group in groupby(entries, key=lambda entry: entry[:2]):
        items = (item for _, _, item in group)
        while chunk := list(islice(items, rows)):
            yield SourceUnit(reader, uri, chunk, split=split)


def read_unit(unit: SourceUnit) -> Iterator[Sample | tuple[str, ImageError, None]]:
    """Yield (name, data, label) of each image in order.

    Data is bytes-like, or an array (H, W[, C]) uint8 or (C, H, W) floats, or an ImageError for an unreadable image.
    """
    if unit.reader == "table":
        yield from table_sources.read_table(unit)
    elif unit.reader == "array":
        yield from _read_array(unit)
    else:
        read = {"files": _read_file, "zip": _read_member, "tar": read_span}[unit.reader]
        for item in unit.items:
            try:
                yield item.name, read(unit, item), item.label
            except (OSError, zipfile.BadZipFile, KeyError, RuntimeError, NotImplementedError, EOFError) as error:
                yield item.name, ImageError(f"cannot be read ({one_line(error, 160)})"), None
            except ImageError as error:
                yield item.name, error, None


def _read_file(unit: SourceUnit, item: Item) -> bytes:
    fs, path = storage.filesystem(item.where)
    check_size(fs.get_file_info(path).size)
    with fs.open_input_stream(path) as file:
        return file.read()


@lru_cache(maxsize=1)
def _zip(uri: str) -> zipfile.ZipFile:
    return zipfile.ZipFile(open_file(uri))


def _read_member(unit: SourceUnit, item: Item) -> bytes:
    archive = _zip(unit.uri)
    info = archive.getinfo(item.where)
    check_size(info.file_size)
    with archive.open(info) as file:
        return file.read(MOST_BYTES + 1)


def _read_array(unit: SourceUnit) -> Iterator[Sample]:
    assert unit.rows is not None
    images = np.load(unit.uri, mmap_mode="r", allow_pickle=False)
    labels = unit.extra["labels"] and np.load(unit.extra["labels"], mmap_mode="r", allow_pickle=False)
    for row in range(*unit.rows):
        yield str(row), images[row], None if labels is None else int(labels[row])
