"""Zip and tar archives as trees of images. Nothing is extracted under a name from an archive."""

from __future__ import annotations

import os
import struct
import tarfile
import zipfile
from collections.abc import Iterable, Iterator
from functools import lru_cache
from typing import Any

from diffscale.core import hub, storage
from diffscale.data.build.decode import MOST_BYTES, ImageError
from diffscale.data.build.items import Item, SourceUnit, check_size, open_file, unreadable
from diffscale.data.build.names import is_unsafe
from diffscale.data.build.tree import Entry, Tree

UNSAFE = "unsafe path in an archive"
AFTER_END = 64 << 10  # bytes after the end of a tar that are looked at; writers pad with zeros to 10 KiB
REPLACED = "a later file of the archive has the same name"


def zip_tree(uri: str) -> Tree:
    """List a zip, by name."""
    try:
        with zipfile.ZipFile(open_file(uri)) as archive:
            members = sorted((m for m in archive.infolist() if not m.is_dir()), key=lambda m: m.filename)
    except (zipfile.BadZipFile, OSError, NotImplementedError, ValueError, struct.error) as error:
        raise unreadable(uri, "a zip archive", error) from None
    entries = [
        Entry(m.orig_filename, "", problem=UNSAFE)
        if is_unsafe(m.filename, m.orig_filename)
        else Entry(m.filename, m.filename, m.file_size, m.CRC)
        for m in members
    ]
    entries = list(last_of_each_name(entries))

    def read(entry: Entry) -> bytes:
        try:
            return read_member(SourceUnit("zip", uri), Item(entry.name, entry.where))
        except (zipfile.BadZipFile, RuntimeError, NotImplementedError, OSError, EOFError) as error:
            raise unreadable(f"{uri}/{entry.name}", "a file that can be unpacked", error) from None

    return Tree(uri, lambda: entries, read)


def tar_tree(uri: str, local: str) -> Tree:
    """List a tar, in its order.

    uri: the source
    local: the tar, unpacked if it was a .tar.gz

    Raises UserError for a tar that is damaged or cut off: some of its files would be missing without a word.
    """
    hub.keep(local)  # the headers are all over the file
    try:
        with open_file(local) as file:
            entries = list(last_of_each_name(_tar_members(file)))
    except (tarfile.TarError, OSError, EOFError) as error:
        raise unreadable(uri, "a tar archive", error) from None

    def read(entry: Entry) -> bytes:
        return read_span(SourceUnit("tar", local), Item(entry.name, entry.where))

    return Tree(local, lambda: entries, read)


def _tar_members(file: Any) -> Iterator[Entry]:
    with tarfile.open(fileobj=file, mode="r:") as archive:
        for member in archive:
            archive.members = []  # type: ignore[attr-defined]  # else it keeps every header
            name = member.name.removeprefix("./")
            if member.isdir():
                continue
            problem = ""
            if is_unsafe(name):
                problem = UNSAFE
            elif not member.isreg() or member.issparse():
                problem = "a link, device or sparse file in an archive"
            yield Entry(name, [member.offset_data, member.size], member.size, 0, problem)
        file.seek(archive.offset)  # tarfile takes a damaged header for the end
        if any(file.read(tarfile.BLOCKSIZE).ljust(tarfile.BLOCKSIZE, b"?")):
            raise tarfile.ReadError(f"it is damaged or cut off at byte {archive.offset:,}")
        if any(file.read(AFTER_END)):
            raise tarfile.ReadError(f"it continues after its end at byte {archive.offset:,}: several tars were joined")


def last_of_each_name(entries: Iterable[Entry]) -> Iterator[Entry]:
    """Yield the entries; of those of one name only the last can be used, as if the archive were extracted."""
    listed = list(entries)
    last = {entry.name: i for i, entry in enumerate(listed)}
    for i, entry in enumerate(listed):
        replaced = last[entry.name] != i and not entry.problem
        yield entry._replace(problem=REPLACED) if replaced else entry


def _state(uri: str) -> tuple[int, ...]:
    """Return what differs when another local file has taken the place of an open one."""
    if storage.is_remote(uri):
        return ()
    found = os.stat(uri.removeprefix("file://"))
    return found.st_ino, found.st_size, found.st_mtime_ns


@lru_cache(maxsize=1)
def _zip(uri: str, _: tuple[int, ...]) -> zipfile.ZipFile:
    return zipfile.ZipFile(open_file(uri))


def read_member(unit: SourceUnit, item: Item) -> bytes:
    """Return a file of a zip. Raises KeyError, ImageError and errors of zipfile."""
    archive = _zip(unit.uri, _state(unit.uri))
    info = archive.getinfo(item.where)
    check_size(info.file_size)
    with archive.open(info) as file:
        return file.read(MOST_BYTES + 1)


@lru_cache(maxsize=1)
def _tar(uri: str, _: tuple[int, ...]) -> Any:
    return open_file(uri)


def read_span(unit: SourceUnit, item: Item) -> bytes:
    """Return a file of a tar. Raises ImageError if the archive ends inside it."""
    offset, size = item.where
    check_size(size)
    file = _tar(unit.uri, _state(unit.uri))
    file.seek(offset)
    data = file.read(size)
    if len(data) != size:
        raise ImageError("the archive ends inside it")
    return data
