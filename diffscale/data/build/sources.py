"""The sources of a build: each kind lists its images as units of work in a fixed order, and reads a unit.

A unit is a run of images from one place that one task turns into shards. An image's name decides whether it is held
out, and identifies it in rejected.csv. No file is extracted under a name from an archive, and nothing is unpickled.
"""

from __future__ import annotations

import csv
import io
import json
import tarfile
import zipfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import groupby, islice
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import numpy as np
from pyarrow import fs as pafs

from diffscale.core import storage
from diffscale.core.errors import UserError
from diffscale.core.text import one_line
from diffscale.data.build import array_sources
from diffscale.data.build.decode import IMAGE_SUFFIXES, MOST_BYTES, ImageError
from diffscale.data.format import hf_tables

SPLIT_FOLDERS = {"train": "train", "val": "heldout", "valid": "heldout", "validation": "heldout", "test": "heldout"}
Reader = Literal["files", "zip", "tar", "table", "array"]
Kind = Literal["auto", "folder", "zip", "tar", "table", "array", "cifar10"]
Label = int | str | None
Sample = tuple[str, Any, Label]


@dataclass(frozen=True)
class Item:
    """One image.

    name: unique in the source
    where: URI, member of a zip, or (offset, size) in a tar
    label: class number or name; None without labels
    """

    name: str
    where: Any
    label: Label = None


@dataclass(frozen=True)
class SourceUnit:
    """A run of images that one task prepares.

    reader: the way to read it
    uri: file of an archive, table or array
    items: images of a folder or archive
    rows: (first, last) of a table or array
    split: `train` or `heldout` if the source decides it, else None
    extra: for the reader: columns of a table, the file of an array's labels
    """

    reader: Reader
    uri: str
    items: list[Item] = field(default_factory=list)
    rows: tuple[int, int] | None = None
    split: str | None = None
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass
class BuildSource:
    """A listed source.

    kind: a `Kind` other than auto
    units: an iterator, so it can be consumed once
    class_names: None if they follow from the labels of all items
    refused: (name, reason) of files in the source that are unsafe or unreadable; grows while `units` is consumed
    latents: (dtype, channels, resolution) of a source of floats
    work: local folder for unpacked archives
    group_bytes: size of the largest row group that must be read as a whole
    """

    kind: str
    units: Iterator[SourceUnit]
    class_names: list[str] | None = None
    refused: list[tuple[str, str]] = field(default_factory=list)
    latents: tuple[str, int, int] | None = None
    work: Path = Path()
    group_bytes: int = 0


def open_source(uri: str, rows: int, work: Path, kind: Kind = "auto", labels: str | None = None) -> BuildSource:
    """List a source. Raises UserError for one that is missing, has no images or is of no known kind.

    uri: local path or URI
    rows: images of a unit
    work: local folder for unpacked archives and arrays
    kind: `auto` decides by the file's name and the folder's content
    labels: CSV of file,label
    """
    fs, path = storage.filesystem(uri)
    info = fs.get_file_info(path)
    if info.type == pafs.FileType.NotFound:
        raise UserError(
            setting="SOURCE", value=uri, expected="a folder, an archive or a file", reason="it does not exist"
        )
    chosen = guess_kind(uri, info) if kind == "auto" else kind
    given = read_labels(labels) if labels else None
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
        table = hf_tables.open_tables(uri)
        source.units = (
            SourceUnit("table", part.uri, rows=(first, last), split=part.split, extra={"columns": table.columns})
            for part in table.parts
            for first, last in part.units(rows)
        )
        source.class_names, source.latents = table.class_names, table.latents
        source.group_bytes = max((p.largest for p in table.parts if not hf_tables.is_mapped(p.uri)), default=0)
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
        label = _label_of(name, inner, given, source)
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


def _unreadable(uri: str, expected: str, error: Exception) -> UserError:
    return UserError(setting="SOURCE", value=uri, expected=expected, reason=one_line(error))


def zip_items(uri: str, source: BuildSource, given: dict[str, str] | None) -> Iterator[tuple[str, str | None, Item]]:
    try:
        archive = zipfile.ZipFile(open_file(uri))
    except (zipfile.BadZipFile, OSError) as error:
        raise _unreadable(uri, "a zip archive", error) from None
    with archive:
        members = sorted((m for m in archive.infolist() if not m.is_dir()), key=lambda m: m.filename)
        labels = next((m for m in members if m.filename == "dataset.json"), None)
        if given is None and labels is not None and labels.file_size < 1 << 30:
            given = _edm_labels(archive.read(labels), uri)
        for member in members:
            if not is_image(member.filename) or _refuse(member.filename, member.orig_filename, source):
                continue
            label = _label_of(member.filename, PurePosixPath(member.filename).parts, given, source)
            if label is not MISSING:
                yield uri, None, Item(member.filename, member.filename, label)


def tar_items(uri: str, source: BuildSource, given: dict[str, str] | None) -> Iterator[tuple[str, str | None, Item]]:
    """Yield images of a tar, or of each .tar in a folder. WebDataset's labels are in `key.cls` or `key.json`."""
    fs, path = storage.filesystem(uri)
    is_folder = fs.get_file_info(path).type == pafs.FileType.Directory
    for archive in storage.list_files(uri, ".tar") if is_folder else [uri]:
        local = array_sources.unpack_gzip(archive, source.work) if archive.endswith("gz") else archive
        for key, group in groupby(_tar_members(local, source), key=lambda entry: entry[0]):
            yield from _tar_sample(local, key, list(group), source, given)


def _tar_members(uri: str, source: BuildSource) -> Iterator[tuple[str, str, int, int, bytes]]:
    """Yield (key, name, offset, size, bytes of a label file) of each regular file."""
    file = open_file(uri)
    try:
        with tarfile.open(fileobj=file, mode="r:") as archive:
            for member in archive:
                name = member.name.removeprefix("./")
                if member.isdir() or _refuse(name, name, source):
                    continue
                if not member.isreg() or member.issparse():
                    source.refused.append((name, "a link, device or sparse file in an archive"))
                    continue
                suffix = name.rsplit("/", 1)[-1].partition(".")[2]
                small = suffix in ("cls", "json", "cls.txt") and member.size < 1 << 20
                data = archive.extractfile(member).read() if small else b""  # type: ignore[union-attr]
                key = name[: len(name) - len(suffix) - 1] if suffix else name
                yield key, name, member.offset_data, member.size, data
    except tarfile.TarError as error:
        raise _unreadable(uri, "a tar archive", error) from None


def _tar_sample(
    uri: str, key: str, group: list[tuple[str, str, int, int, bytes]], source: BuildSource, given: dict[str, str] | None
) -> Iterator[tuple[str, str | None, Item]]:
    label: Label = None
    for _, name, _, _, data in group:
        if data and name.endswith((".cls", ".cls.txt")):
            text = data.decode("utf-8", "replace").strip()
            label = int(text) if text.lstrip("-").isdigit() else text
        elif data and name.endswith(".json"):
            try:
                entry = json.loads(data)
            except (ValueError, RecursionError):
                continue
            value = entry.get("label", entry.get("cls")) if isinstance(entry, dict) else None
            label = value if label is None and isinstance(value, int | str) else label
    for _, name, offset, size, _ in group:
        if is_image(name):
            found = _label_of(name, PurePosixPath(name).parts, given, source) if label is None else label
            if found is not MISSING:
                yield uri, None, Item(key if len(group) > 1 else name, [offset, size], found)


class _Missing:
    """The label of a file that is not in the list of labels."""


MISSING: Any = _Missing()


def _label_of(name: str, parts: tuple[str, ...], given: dict[str, str] | None, source: BuildSource) -> Label:
    if given is None:
        return parts[0] if len(parts) > 1 else None
    for key in (name, parts[-1]):
        if key in given:
            return given[key]
    source.refused.append((name, "not in the list of labels"))
    return MISSING


def _edm_labels(data: bytes, uri: str) -> dict[str, str] | None:
    """Return the labels in a dataset.json of StyleGAN or EDM: {"labels": [[file, class], ...]} or {"labels": null}."""
    try:
        pairs = json.loads(data)["labels"]
        return None if pairs is None else {str(file): str(int(label)) for file, label in pairs}
    except (ValueError, KeyError, TypeError) as error:
        raise _unreadable(f"{uri}/dataset.json", '"labels": [[file, class], ...]', error) from None


def is_image(name: str) -> bool:
    """Return whether a path names an image file: neither hidden nor in a macOS resource folder."""
    stem = name.rsplit("/", 1)[-1]
    return not stem.startswith(".") and "__MACOSX" not in name and PurePosixPath(stem.lower()).suffix in IMAGE_SUFFIXES


def _refuse(name: str, original: str, source: BuildSource) -> bool:
    """Return whether a name points outside the archive; it must not be used, not even as a class."""
    unsafe = name.startswith("/") or "\\" in original or "\0" in original or ".." in PurePosixPath(name).parts
    if unsafe or (len(name) > 1 and name[1] == ":"):
        source.refused.append((original, "unsafe path in an archive"))
        return True
    return False


def _in_units(entries: Iterable[tuple[str, str | None, Item]], rows: int, reader: Reader) -> Iterator[SourceUnit]:
    for (uri, split), group in groupby(entries, key=lambda entry: entry[:2]):
        items = (item for _, _, item in group)
        while chunk := list(islice(items, rows)):
            yield SourceUnit(reader, uri, chunk, split=split)


def open_file(uri: str) -> Any:
    """Open a seekable reader of a local or remote file."""
    fs, path = storage.filesystem(uri)
    return open(path, "rb") if isinstance(fs, pafs.LocalFileSystem) else fs.open_input_file(path)


def read_unit(unit: SourceUnit) -> Iterator[Sample | tuple[str, ImageError, None]]:
    """Yield (name, data, label) of each image in order.

    Data is bytes-like, or an array (H, W[, C]) uint8 or (C, H, W) floats, or an ImageError for an unreadable image.
    """
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
                yield item.name, ImageError(f"cannot be read ({one_line(error, 160)})"), None
            except ImageError as error:
                yield item.name, error, None


def _check_size(size: int) -> None:
    if size > MOST_BYTES:
        raise ImageError(f"the file has more than {MOST_BYTES:,} bytes")


def _read_file(unit: SourceUnit, item: Item) -> bytes:
    fs, path = storage.filesystem(item.where)
    _check_size(fs.get_file_info(path).size)
    with fs.open_input_stream(path) as file:
        return file.read()


@lru_cache(maxsize=1)
def _zip(uri: str) -> zipfile.ZipFile:
    return zipfile.ZipFile(open_file(uri))


def _read_member(unit: SourceUnit, item: Item) -> bytes:
    archive = _zip(unit.uri)
    info = archive.getinfo(item.where)
    _check_size(info.file_size)
    with archive.open(info) as file:
        return file.read(MOST_BYTES + 1)


@lru_cache(maxsize=1)
def _tar(uri: str) -> Any:
    return open_file(uri)


def _read_span(unit: SourceUnit, item: Item) -> bytes:
    offset, size = item.where
    _check_size(size)
    file = _tar(unit.uri)
    file.seek(offset)
    data = file.read(size)
    if len(data) != size:
        raise ImageError("the archive ends inside it")
    return data


def _read_table(unit: SourceUnit) -> Iterator[Sample | tuple[str, ImageError, None]]:
    assert unit.rows is not None
    columns = hf_tables.Columns(**unit.extra["columns"])
    numbers = {s: i for i, s in enumerate(columns.strings or ())}
    wanted = [columns.image] + ([columns.label] if columns.label else [])
    file, row = unit.uri.split("/")[-1], 0
    for group, (count, _) in enumerate(hf_tables.group_sizes(unit.uri)):
        if row + count > unit.rows[0] and row < unit.rows[1]:
            table = hf_tables.read_group(unit.uri, group, wanted).combine_chunks()
            images = table[columns.image].combine_chunks()
            labels = table[columns.label].to_pylist() if columns.label else [None] * count
            for i in range(max(0, unit.rows[0] - row), min(count, unit.rows[1] - row)):
                name, data = f"{file}:{row + i}", hf_tables.image_bytes(images, i)
                if data is None:
                    yield name, ImageError("the row has no image bytes"), None
                elif columns.label and labels[i] is None:
                    yield name, ImageError("the row has no label"), None
                else:
                    yield name, data, numbers.get(str(labels[i]), labels[i])
        row += count


def _read_array(unit: SourceUnit) -> Iterator[Sample]:
    assert unit.rows is not None
    images = np.load(unit.uri, mmap_mode="r", allow_pickle=False)
    labels = unit.extra["labels"] and np.load(unit.extra["labels"], mmap_mode="r", allow_pickle=False)
    for row in range(*unit.rows):
        yield str(row), images[row], None if labels is None else int(labels[row])
