"""What a build reads from: each kind of source lists its images as units of work, in a fixed order.

A unit is a run of images of one place that one task turns into shards. Names decide what is held out, and stand in
rejected.csv. Nothing is ever extracted to disk under a name from an archive, and nothing is unpickled.
"""

from __future__ import annotations

import csv
import io
import json
import tarfile
import zipfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import groupby, islice
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from pyarrow import fs as pafs

from diffscale.core import storage
from diffscale.core.errors import UserError
from diffscale.data.build import array_sources as arrays
from diffscale.data.format import hf_tables as tables

IMAGES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".jp2", ".avif"}
SPLIT_FOLDERS = {"train": "train", "val": "heldout", "valid": "heldout", "validation": "heldout", "test": "heldout"}
Reader = Literal["files", "zip", "tar", "table", "array"]
Kind = Literal["auto", "folder", "zip", "tar", "table", "array", "cifar10"]
Label = int | str | None


@dataclass(frozen=True)
class Item:
    """One image. where: URI, member of a zip, or (offset, size) in a tar."""

    name: str
    where: Any
    label: Label = None


@dataclass(frozen=True)
class Unit:
    """items: of files and archives; rows: (first, last) of tables and arrays; split: given by the source, or None."""

    reader: Reader
    uri: str
    items: list[Item] = field(default_factory=list)
    rows: tuple[int, int] | None = None
    split: str | None = None
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass
class Listing:
    """units: may be consumed once. class_names: known before, or filled from the labels while listing. refused: names
    in the source that are unsafe or unreadable, with the reason. latents: (dtype, channels, resolution) of floats.
    group_bytes: of the largest row group that has to be read as a whole."""

    kind: str
    units: Iterator[Unit]
    class_names: list[str] | None = None
    refused: list[tuple[str, str]] = field(default_factory=list)
    latents: tuple[str, int, int] | None = None
    work: Path = Path()
    group_bytes: int = 0


def list_source(uri: str, rows: int, work: Path, kind: Kind = "auto", labels: str | None = None) -> Listing:
    """uri: local path or URI. rows: images of a unit. work: local folder for unpacked arrays. labels: a CSV of
    file, label. Raises UserError for a source that is missing, empty of images or of no known kind."""
    fs, path = storage.filesystem(uri)
    info = fs.get_file_info(path)
    if info.type == pafs.FileType.NotFound:
        raise UserError(setting="SOURCE", value=uri, expected="a folder, an archive or a file; there is nothing")
    chosen = guess_kind(uri, info) if kind == "auto" else kind
    given = read_labels(labels) if labels else None
    listing = Listing(chosen, iter(()), work=work)
    if chosen in ("array", "cifar10"):
        found = arrays.open_cifar10(uri, work) if chosen == "cifar10" else arrays.open_arrays(uri, work)
        listing.units = (
            Unit("array", a.images, rows=(first, min(first + rows, a.n)), split=a.split, extra={"labels": a.labels})
            for a in found
            for first in range(0, a.n, rows)
        )
        listing.class_names, listing.latents = found[0].class_names, found[0].latents
    elif chosen == "table":
        table = tables.open_tables(uri)
        listing.units = (
            Unit("table", part.uri, rows=(first, last), split=part.split, extra={"columns": table.columns})
            for part in table.parts
            for first, last in part.units(rows)
        )
        listing.class_names, listing.latents = table.class_names, table.latents
        listing.group_bytes = max((p.largest for p in table.parts if not tables.is_mapped(p.uri)), default=0)
    else:
        readers: dict[str, tuple[Any, Reader]]
        readers = {"folder": (folder_items, "files"), "zip": (zip_items, "zip"), "tar": (tar_items, "tar")}
        items, reader = readers[chosen]
        listing.units = _in_units(items(uri, listing, given), rows, reader)
    return listing


def guess_kind(uri: str, info: pafs.FileInfo) -> Kind:
    name = uri.lower()
    if info.type == pafs.FileType.Directory:
        names = [f.split("/")[-1] for f in storage.list_files(uri)]
        if tables.is_dataset(uri):
            return "table"
        if any(n.endswith("_batch.bin") or n.startswith("data_batch_") for n in names):
            return "cifar10"
        if any(n.endswith(".tar") for n in names):
            return "tar"
        if any(n.endswith((".npz", ".npy")) for n in names):
            return "array"
        return "folder"
    if arrays.looks_like_cifar10(name.split("/")[-1]):
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
    """File -> label of a CSV with two columns; a first line `file,label` is a header."""
    try:
        rows = [row for row in csv.reader(io.StringIO(storage.read_bytes(uri).decode("utf-8-sig"))) if row]
    except (FileNotFoundError, UnicodeDecodeError) as error:
        raise UserError(setting="--labels", value=uri, expected=f"a CSV of file,label ({error})") from None
    bad = next((row for row in rows if len(row) < 2), None)
    if not rows or bad:
        raise UserError(
            setting="--labels", value=uri, expected=f"two columns, file and label, in every line, not {bad}"
        )
    start = 1 if rows[0][0].strip().lower() in ("file", "filename", "path", "name", "image") else 0
    return {row[0].strip(): row[1].strip() for row in rows[start:]}


def folder_items(uri: str, listing: Listing, given: dict[str, str] | None) -> Iterator[tuple[str, str | None, Item]]:
    """(uri, split, item) of every image below a folder; class = first folder (below train/, val/ if it has those)."""
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
        label = _label_of(name, inner, given, listing)
        if label is not MISSING:
            yield uri, split, Item(name, scheme + path, label)


def _walk(fs: pafs.FileSystem, folder: str) -> Iterator[str]:
    """Images below a folder, one folder in memory at a time, in the order of their names."""
    infos = sorted(fs.get_file_info(pafs.FileSelector(folder)), key=lambda i: i.base_name)
    for info in infos:
        if info.type == pafs.FileType.File and is_image(info.base_name):
            yield info.path
    for info in infos:
        if info.type == pafs.FileType.Directory and not info.base_name.startswith("."):
            yield from _walk(fs, info.path)


def _files_of_bucket(fs: pafs.FileSystem, root: str) -> list[tuple[str, ...]] | None:
    """The images below a prefix of Google's, by their parts, in the order of `_walk`; None for other file systems.

    Objects there lie in no folders, so pyarrow finds none in a prefix but those that were made as such.
    """
    if not isinstance(fs, pafs.GcsFileSystem):
        return None
    infos = fs.get_file_info(pafs.FileSelector(root, recursive=True))
    names = [PurePosixPath(i.path[len(root.rstrip("/")) + 1 :]).parts for i in infos if i.type == pafs.FileType.File]
    names = [parts for parts in names if is_image(parts[-1]) and not any(p.startswith(".") for p in parts[:-1])]
    return sorted(names, key=lambda parts: [*((True, p) for p in parts[:-1]), (False, parts[-1])])


def zip_items(uri: str, listing: Listing, given: dict[str, str] | None) -> Iterator[tuple[str, str | None, Item]]:
    try:
        archive = zipfile.ZipFile(open_file(uri))
    except (zipfile.BadZipFile, OSError) as error:
        raise UserError(setting="SOURCE", value=uri, expected=f"a zip archive ({error})") from None
    with archive:
        members = sorted((m for m in archive.infolist() if not m.is_dir()), key=lambda m: m.filename)
        labels = next((m for m in members if m.filename == "dataset.json"), None)
        if given is None and labels is not None and labels.file_size < 1 << 30:
            given = _edm_labels(archive.read(labels), uri)
        for member in members:
            if not is_image(member.filename) or _refuse(member.filename, member.orig_filename, listing):
                continue
            label = _label_of(member.filename, PurePosixPath(member.filename).parts, given, listing)
            if label is not MISSING:
                yield uri, None, Item(member.filename, member.filename, label)


def tar_items(uri: str, listing: Listing, given: dict[str, str] | None) -> Iterator[tuple[str, str | None, Item]]:
    """A tar, or every .tar of a folder. Files `key.cls` and `key.json` ({"label": ...}) are WebDataset's labels."""
    fs, path = storage.filesystem(uri)
    is_folder = fs.get_file_info(path).type == pafs.FileType.Directory
    for archive in storage.list_files(uri, ".tar") if is_folder else [uri]:
        local = arrays.unpack_gzip(archive, listing.work) if archive.endswith("gz") else archive
        for key, group in groupby(_tar_members(local, listing), key=lambda entry: entry[0]):
            yield from _tar_sample(local, key, list(group), listing, given)


def _tar_members(uri: str, listing: Listing) -> Iterator[tuple[str, str, int, int, bytes]]:
    """(key, name, offset, size, label file's bytes) of each regular file."""
    source = open_file(uri)
    try:
        with tarfile.open(fileobj=source, mode="r:") as archive:
            for member in archive:
                name = member.name.removeprefix("./")
                if member.isdir() or _refuse(name, name, listing):
                    continue
                if not member.isreg() or member.issparse():
                    listing.refused.append((name, "a link, device or sparse file in an archive"))
                    continue
                suffix = name.rsplit("/", 1)[-1].partition(".")[2]
                small = suffix in ("cls", "json", "cls.txt") and member.size < 1 << 20
                data = archive.extractfile(member).read() if small else b""  # type: ignore[union-attr]
                key = name[: len(name) - len(suffix) - 1] if suffix else name
                yield key, name, member.offset_data, member.size, data
    except tarfile.TarError as error:
        raise UserError(setting="SOURCE", value=uri, expected=f"a tar archive ({error})") from None


def _tar_sample(
    uri: str, key: str, group: list[tuple[str, str, int, int, bytes]], listing: Listing, given: dict[str, str] | None
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
            found = _label_of(name, PurePosixPath(name).parts, given, listing) if label is None else label
            if found is not MISSING:
                yield uri, None, Item(key if len(group) > 1 else name, [offset, size], found)


class _Missing:
    """The label of a file that the list of labels leaves out."""


MISSING: Any = _Missing()


def _label_of(name: str, parts: tuple[str, ...], given: dict[str, str] | None, listing: Listing) -> Label:
    if given is None:
        return parts[0] if len(parts) > 1 else None
    for key in (name, parts[-1]):
        if key in given:
            return given[key]
    listing.refused.append((name, "not in the list of labels"))
    return MISSING


def _edm_labels(data: bytes, uri: str) -> dict[str, str] | None:
    """dataset.json as StyleGAN and EDM write it: {"labels": [[file, class], ...]} or {"labels": null}."""
    try:
        pairs = json.loads(data)["labels"]
        return None if pairs is None else {str(file): str(int(label)) for file, label in pairs}
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            setting="SOURCE", value=f"{uri}/dataset.json", expected=f'"labels": [[file, class], ...] ({error})'
        ) from None


def is_image(name: str) -> bool:
    stem = name.rsplit("/", 1)[-1]
    return not stem.startswith(".") and "__MACOSX" not in name and PurePosixPath(stem.lower()).suffix in IMAGES


def _refuse(name: str, original: str, listing: Listing) -> bool:
    """Names that point outside of the archive are never used, not even as a class."""
    unsafe = name.startswith("/") or "\\" in original or "\0" in original or ".." in PurePosixPath(name).parts
    if unsafe or (len(name) > 1 and name[1] == ":"):
        listing.refused.append((original, "unsafe path in an archive"))
        return True
    return False


def _in_units(entries: Iterable[tuple[str, str | None, Item]], rows: int, reader: Reader) -> Iterator[Unit]:
    for (uri, split), group in groupby(entries, key=lambda entry: entry[:2]):
        items = (item for _, _, item in group)
        while chunk := list(islice(items, rows)):
            yield Unit(reader, uri, chunk, split=split)


def open_file(uri: str) -> Any:
    """A seekable reader of a local or remote file."""
    fs, path = storage.filesystem(uri)
    return open(path, "rb") if isinstance(fs, pafs.LocalFileSystem) else fs.open_input_file(path)
