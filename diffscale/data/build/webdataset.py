"""Tar archives: WebDataset's samples, and plain tars of images. Nothing is extracted under a name from an archive."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterator
from functools import lru_cache
from itertools import groupby
from pathlib import PurePosixPath
from typing import Any

from pyarrow import fs as pafs

from diffscale.core import storage
from diffscale.data.build import array_sources
from diffscale.data.build.decode import ImageError
from diffscale.data.build.items import (
    MISSING,
    BuildSource,
    Item,
    Label,
    SourceUnit,
    check_size,
    is_image,
    label_of,
    open_file,
    refuse,
    unreadable,
)


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
                if member.isdir() or refuse(name, name, source):
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
        raise unreadable(uri, "a tar archive", error) from None


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
            found = label_of(name, PurePosixPath(name).parts, given, source) if label is None else label
            if found is not MISSING:
                yield uri, None, Item(key if len(group) > 1 else name, [offset, size], found)


@lru_cache(maxsize=1)
def _tar(uri: str) -> Any:
    return open_file(uri)


def read_span(unit: SourceUnit, item: Item) -> bytes:
    offset, size = item.where
    check_size(size)
    file = _tar(unit.uri)
    file.seek(offset)
    data = file.read(size)
    if len(data) != size:
        raise ImageError("the archive ends inside it")
    return data
