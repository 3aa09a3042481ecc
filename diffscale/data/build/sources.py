"""The sources of a build: each kind lists its images as units of work in a fixed order, and reads a unit.

No file is extracted under a name from an archive, and nothing is unpickled.
"""

from __future__ import annotations

import os
import re
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from pyarrow import fs as pafs

from diffscale.core import hub, storage
from diffscale.core.errors import UserError
from diffscale.core.text import one_line
from diffscale.data.build import array_sources, folders, table_sources
from diffscale.data.build.archives import read_member, read_span, tar_tree, zip_tree
from diffscale.data.build.decode import ImageError
from diffscale.data.build.items import BuildSource, Item, Kind, Reader, Reading, Sample, SourceUnit, check_size
from diffscale.data.build.labels import LabelList, read_labels
from diffscale.data.build.names import is_image, printable, some
from diffscale.data.build.tree import Entry, Tree, tree_items
from diffscale.data.build.webdataset import is_webdataset, one_image_each, sample_items, splits_of
from diffscale.data.format import hf_tables
from diffscale.data.format.hf_labels import NO_LABEL
from diffscale.data.format.split_names import split_of

ENDINGS: dict[str, tuple[str, ...]] = {
    "zip": (".zip",),
    "tar": (".tar", ".tar.gz", ".tgz"),
    "array": (".npz", ".npy"),
    "table": (".parquet", ".arrow"),
}
OF_TREES = ("folder", "zip", "tar")
WORDNET = re.compile(r"n\d{8}")  # a class of ImageNet, whose images are in a tar of that name


def open_source(uri: str, rows: int, work: Path, reading: Reading) -> BuildSource:
    """List a source. Raises UserError for one that is missing, has no images or can be read in several ways.

    uri: local path or URI
    rows: images of a unit
    work: local folder for unpacked archives and arrays
    reading: a person's choices; the kind `auto` is decided by the file's name and the folder's content
    """
    folder = is_folder(uri)
    kind = guess_kind(uri, folder) if reading.kind == "auto" else reading.kind
    source = BuildSource(kind, iter(()), work=work)
    _check_choices(uri, kind, folder, reading)
    if kind in ("array", "cifar10"):
        _open_arrays(uri, rows, reading, source)
    elif kind == "table":
        table_sources.open_table(uri, rows, reading, source)
    else:
        given = read_labels(reading.labels, reading.label_column) if reading.labels else None
        source.units = _of_trees(uri, folder, rows, source, reading, given)
    if folder and kind in ("array", "table", "tar"):
        source.left_out += list(_not_of_kind(uri, kind))
    return source


def is_folder(uri: str) -> bool:
    """Return whether a source is a folder. Raises UserError if it does not exist."""
    fs, path = storage.filesystem(uri)
    info = fs.get_file_info(path)
    if info.type == pafs.FileType.NotFound:
        raise UserError(
            setting="SOURCE", value=uri, expected="a folder, an archive or a file", reason="it does not exist"
        )
    return info.type == pafs.FileType.Directory


def guess_kind(uri: str, folder: bool) -> Kind:
    """Return the kind of a source by the file's name or the folder's content.

    Raises UserError for a file of no known kind, and for a folder of several kinds.
    """
    if folder:
        return _kind_of_folder(uri)
    name = uri.lower().rsplit("/", 1)[-1]
    if array_sources.looks_like_cifar10(name):
        return "cifar10"
    for kind, ends in ENDINGS.items():
        if name.endswith(ends):
            return kind  # type: ignore[return-value]
    raise UserError(
        setting="SOURCE",
        value=uri,
        expected="a folder of images, .zip, .tar (WebDataset), .parquet, .arrow, .npz, .npy or CIFAR-10's archive",
    )


def _kind_of_folder(uri: str) -> Kind:
    names = [file.split("/")[-1] for file in storage.list_files(uri)]
    if hf_tables.is_dataset(uri):
        return "table"
    if any(name.endswith("_batch.bin") or name.startswith("data_batch_") for name in names):
        return "cifar10"
    tars, arrays = (sorted(n for n in names if n.endswith(ENDINGS[kind])) for kind in ("tar", "array"))
    images: list[str] = []
    if tars or arrays:
        images = [entry.name for entry in folders.walk(uri) if is_image(entry.name) and not entry.problem]
    elif not any(is_image(entry.name) for entry in folders.walk(uri)):
        tars = _tars(uri)
    found: dict[Kind, list[str]] = {"folder": images, "tar": tars, "array": arrays}
    there = [kind for kind, files in found.items() if files]
    if len(there) > 1:
        raise UserError(
            setting="SOURCE",
            value=uri,
            expected="images, or tars, or arrays",
            reason="it has " + " and ".join(f"{len(found[k]):,} of the kind {k} ({some(found[k], 2)})" for k in there),
            fix=" or ".join(f"--kind {kind}" for kind in there) + " says which of them are the data",
        )
    return there[0] if there else "folder"


def _check_choices(uri: str, kind: Kind, folder: bool, reading: Reading) -> None:
    """Raise UserError for a kind that the source cannot be, and for a choice that its kind does not have."""
    if (kind == "folder" and not folder) or (kind == "zip" and folder):
        raise UserError(setting="--kind", value=kind, expected="the kind of the source", reason=f"{uri} is no {kind}")
    kinds: dict[str, tuple[str, ...]] = {
        "labels": OF_TREES,
        "split_names": (*OF_TREES, "table", "array"),
        "folders": OF_TREES,
        "image_column": ("table", "tar", "array"),
        "label_column": OF_TREES if reading.labels else ("table", "tar", "array"),
        "config": ("table",),
    }
    for choice, valid in kinds.items():
        value = getattr(reading, choice)
        if value is not None and kind not in valid:
            raise UserError(
                setting=f"--{choice.replace('_', '-')}",
                value=value,
                expected=f"an option of {' and '.join(', '.join(f'{name}s' for name in valid).rsplit(', ', 1))}",
                reason=f"{uri} is read as {kind}",
                fix="--label-column names a column of the CSV in --labels" if choice == "label_column" else "",
            )


def _open_arrays(uri: str, rows: int, reading: Reading, source: BuildSource) -> None:
    if source.kind == "cifar10":
        found = array_sources.open_cifar10(uri, source.work)
    else:
        found = array_sources.open_arrays(uri, source.work, reading, source.left_out)
    source.units = (
        SourceUnit("array", a.images, rows=(first, min(first + rows, a.n)), split=a.split, extra={"labels": a.labels})
        for a in found
        for first in range(0, a.n, rows)
    )
    source.class_names, source.latents = found[0].class_names, found[0].latents


def _of_trees(
    uri: str, folder: bool, rows: int, source: BuildSource, reading: Reading, given: LabelList | None
) -> Iterator[SourceUnit]:
    """Yield the units of a folder, zip or tar, or of a folder of tars."""
    if source.kind == "folder":
        tree = _folder_tree(uri)
        source.files = tree.files
        yield from _in_units(tree_items(tree, source, reading, given), rows, "files")
        return
    if source.kind == "zip":
        yield from _in_units(tree_items(zip_tree(uri), source, reading, given), rows, "zip")
        return
    archives = _tars(uri) if folder else [uri]
    if not archives:
        raise UserError(setting="SOURCE", value=uri, expected="a folder of .tar files", reason="it has none")
    trees = {file: tar_tree(file, _unpacked(file, i, source)) for i, file in enumerate(archives)}
    if is_webdataset(trees.values(), reading):
        splits = splits_of(uri, archives, source, reading)
        samples = sample_items(((trees[file], split) for file, split in splits.items()), source, reading, given)
        yield from _in_units(samples, rows, "tar")
    else:
        plain = [(_stem(file, uri), one_image_each(tree, reading)) for file, tree in trees.items()]
        yield from _in_units(_tree_of_tars(uri, plain, source, reading, given), rows, "tar")


def _tars(uri: str) -> list[str]:
    """Return the tars in a folder; of a folder without any, those in its folders."""
    found = [file for file in storage.list_files(uri) if file.endswith(ENDINGS["tar"])]
    return found or [file for file in storage.list_files(uri, recursive=True) if file.endswith(ENDINGS["tar"])]


def _unpacked(file: str, number: int, source: BuildSource) -> str:
    """Return a tar, unpacked to a folder of its own if it is a .tar.gz."""
    return array_sources.unpack_gzip(file, source.work / f"tar-{number:05d}") if file.endswith("gz") else file


def _stem(file: str, uri: str) -> str:
    """Return the path of a tar in its source without its extension, or its folder if its name is a number."""
    path = re.sub(r"(\.tar|\.tar\.gz|\.tgz)$", "", file.removeprefix(uri.rstrip("/") + "/"))
    folder, _, name = path.rpartition("/")
    return folder if folder and name.isdecimal() else path


def _tree_of_tars(
    uri: str, trees: list[tuple[str, Tree]], source: BuildSource, reading: Reading, given: LabelList | None
) -> Iterator[tuple[str, str | None, Item]]:
    """Yield the images of one tar, or of several as one tree in which each tar is a folder.

    Tars that are numbered pieces of one (shard-000.tar, shard-001.tar) are no folders.
    """
    stems = [stem for stem, _ in trees]
    several = len({re.sub(r"\d+", "", stem) for stem in stems}) > 1
    named = several or (len(stems) > 1 and any(split_of(stem) or WORDNET.fullmatch(stem) for stem in stems))

    def files() -> Iterator[Entry]:
        for stem, tree in trees:
            for entry in tree.files():
                name = f"{stem}/{entry.name}" if named else entry.name
                yield entry._replace(name=name, where=[tree.uri, *entry.where])

    def read(entry: Entry) -> bytes:
        place, *span = entry.where
        return read_span(SourceUnit("tar", place), Item(entry.name, span))

    for _, split, item in tree_items(Tree(uri, files, read), source, reading, given):
        place, *span = item.where
        yield place, split, Item(item.name, span, item.label)


def _folder_tree(uri: str) -> Tree:
    if not storage.is_remote(uri):
        return Tree(uri, lambda: folders.walk(uri), lambda entry: read_whole(entry.where))
    entries = list(folders.walk(uri))  # in memory: to list a bucket again takes minutes
    return Tree(uri, lambda: entries, lambda entry: read_whole(entry.where))


def _not_of_kind(uri: str, kind: Kind) -> Iterator[tuple[str, str]]:
    """Yield (name, reason) of the files of a folder that are not of the kind as which it is read."""
    deep = kind == "table" or (kind == "tar" and any("/" in file.removeprefix(uri + "/") for file in _tars(uri)))
    for entry in folders.walk(uri):
        read = entry.name.endswith(ENDINGS[kind]) and ("/" not in entry.name or deep)
        if not read or entry.name.startswith("."):
            yield printable(entry.name), entry.problem or f"the source is read as {kind}, and this is none of its files"


def _in_units(entries: Iterable[tuple[str, str | None, Item]], rows: int, reader: Reader) -> Iterator[SourceUnit]:
    """Collect images of one file and split in units, in their order; splits may alternate."""
    held: dict[tuple[str, str | None], list[Item]] = {}
    for uri, split, item in entries:
        items = held.setdefault((uri, split), [])
        items.append(item)
        if len(items) == rows:
            yield SourceUnit(reader, uri, held.pop((uri, split)), split=split)
        for other in [place for place in held if place[0] != uri]:  # the archive before
            yield SourceUnit(reader, other[0], held.pop(other), split=other[1])
    for (uri, split), items in held.items():
        yield SourceUnit(reader, uri, items, split=split)


def read_unit(unit: SourceUnit) -> Iterator[Sample | tuple[str, ImageError, None]]:
    """Yield (name, data, label) of each image in order.

    Data is bytes-like, or an array (H, W[, C]) uint8 or (C, H, W) floats, or an ImageError for an unreadable image.
    """
    for uri in [item.where for item in unit.items] if unit.reader == "files" else [unit.uri]:
        hub.keep(uri)
    if unit.reader == "table":
        yield from table_sources.read_table(unit)
    elif unit.reader == "array":
        yield from _read_array(unit)
    else:
        read = {"files": _read_file, "zip": read_member, "tar": read_span}[unit.reader]
        for item in unit.items:
            try:
                yield item.name, read(unit, item), item.label
            except (OSError, zipfile.BadZipFile, KeyError, RuntimeError, NotImplementedError, EOFError) as error:
                yield item.name, ImageError(f"cannot be read ({one_line(error, 160)})"), None
            except ImageError as error:
                yield item.name, error, None


def _read_file(unit: SourceUnit, item: Item) -> bytes:
    return read_whole(item.where)


def read_whole(uri: str) -> bytes:
    """Return a file. Raises ImageError for a file that is too large, and OSError."""
    fs, path = storage.filesystem(uri)
    if isinstance(fs, pafs.LocalFileSystem):  # pyarrow has no names in other encodings than UTF-8
        with open(path, "rb") as local:
            check_size(os.fstat(local.fileno()).st_size)
            return local.read()
    check_size(fs.get_file_info(path).size)
    with fs.open_input_stream(path) as file:
        return file.read()


def _read_array(unit: SourceUnit) -> Iterator[Sample]:
    assert unit.rows is not None
    images = np.load(unit.uri, mmap_mode="r", allow_pickle=False)
    labels = unit.extra["labels"] and np.load(unit.extra["labels"], mmap_mode="r", allow_pickle=False)
    for row in range(*unit.rows):
        number = NO_LABEL if labels is None else int(labels[row])
        yield str(row), images[row], None if number == NO_LABEL else number
