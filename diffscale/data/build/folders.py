"""Walks over the files of a folder, local or in an object store, always in the same order."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from pyarrow import fs as pafs

from diffscale.core import storage
from diffscale.data.build.names import printable, why_no_image
from diffscale.data.build.tree import Entry


def walk(uri: str) -> Iterator[Entry]:
    """Yield every file under a folder: those of a folder by name, then its folders by name."""
    fs, root = storage.filesystem(uri)
    if isinstance(fs, pafs.LocalFileSystem):
        yield from _Walk(root).files()
        return
    scheme = uri.split("://")[0] + "://"
    root = root.rstrip("/")
    for info in _walk_flat(fs, root) if isinstance(fs, pafs.GcsFileSystem) else _walk_remote(fs, root):
        name = info.path[len(root) + 1 :]
        yield Entry(name, scheme + info.path, info.size or 0, info.mtime_ns or 0)


def _walk_remote(fs: pafs.FileSystem, folder: str) -> Iterator[pafs.FileInfo]:
    """Yield files with one folder in memory at a time."""
    infos = sorted(fs.get_file_info(pafs.FileSelector(folder)), key=lambda i: i.base_name)
    yield from (info for info in infos if info.type == pafs.FileType.File)
    for info in infos:
        if info.type == pafs.FileType.Directory:
            yield from _walk_remote(fs, info.path)


def _walk_flat(fs: pafs.FileSystem, root: str) -> Iterator[pafs.FileInfo]:
    """Yield files under a prefix of gs://.

    Google's objects are not in folders, so pyarrow finds only folders that were created explicitly.
    """
    infos = fs.get_file_info(pafs.FileSelector(root, recursive=True))
    files = [(PurePosixPath(i.path[len(root) + 1 :]).parts, i) for i in infos if i.type == pafs.FileType.File]
    files.sort(key=lambda file: [*((True, part) for part in file[0][:-1]), (False, file[0][-1])])
    yield from (info for _, info in files)


class _Place(NamedTuple):
    """A folder to read: its path, its name in the source, its path without links, and whether links are followed."""

    path: str
    name: str
    real: str
    follow: bool


class _Walk:
    """A walk over a local folder that reads each file once, whatever links there are.

    A link to a place in the same folder is not followed, because that place is read under its own name. A link to a
    place outside is followed once. The names are those of the system; they need not be UTF-8.
    """

    def __init__(self, root: str) -> None:
        self.root, self.real = root, os.path.realpath(root)
        self.followed: dict[str, str] = {}  # targets of links outside, and the links

    def files(self) -> Iterator[Entry]:
        places = [_Place(self.root, "", self.real, True)]
        while places:
            place = places.pop()
            try:
                with os.scandir(place.path) as listed:
                    entries = sorted(listed, key=lambda e: e.name)
            except OSError as error:
                yield Entry(place.name, place.path, problem=f"the folder cannot be read ({error.strerror})")
                continue
            inner: list[_Place] = []
            for entry in entries:
                name = f"{place.name}/{entry.name}" if place.name else entry.name
                real = f"{place.real}/{entry.name}"
                if entry.is_symlink():
                    real = os.path.realpath(entry.path)
                    problem = self.problem_of_link(entry, real) if place.follow else "a link"
                    if problem:
                        yield Entry(name, entry.path, problem=problem)
                        continue
                    self.followed[real] = name
                elif real in self.followed:  # reached through a link before
                    yield Entry(name, entry.path, problem=f"it is read as {printable(self.followed[real])}")
                    continue
                if entry.is_dir():
                    hidden = bool(why_no_image(f"{name}/image.png"))
                    inner.append(_Place(entry.path, name, real, place.follow and not hidden))
                    continue
                try:
                    state = entry.stat()
                except OSError as error:
                    yield Entry(name, entry.path, problem=f"it cannot be read ({error.strerror})")
                    continue
                problem = "" if entry.is_file() else "neither a file nor a folder"
                yield Entry(name, entry.path, state.st_size, state.st_mtime_ns, problem)
            places += reversed(inner)

    def problem_of_link(self, entry: os.DirEntry[str], real: str) -> str:
        """Return why a link is not followed; empty if it is."""
        if not os.path.exists(real):
            return "a link to something that does not exist"
        if real == self.real or self.real.startswith(real.rstrip("/") + "/"):
            return "a link to a folder that it is in"
        if real.startswith(self.real + "/"):
            inside = real[len(self.real) + 1 :]
            own = f"{inside}/image.png" if os.path.isdir(real) else f"{Path(inside).parent}/image.png"
            if not why_no_image(own):  # files below hidden folders have no name of their own (git annex)
                return f"a link to {printable(inside)}, which is read under its own name"
        place = next((p for p in (real, *map(str, Path(real).parents)) if p in self.followed), None)
        if place is not None:
            return f"a link to what is read as {printable(self.followed[place])}"
        return ""
