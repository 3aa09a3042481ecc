"""The state of a source, by which a finished or interrupted build notices that the source has changed since.

Of a folder it is the names and sizes of its images, and the times of their last change; if only times differ, the
content decides, which the build hashes as it reads. Of a zip it is the names, sizes and checksums of its members. Of
other files it is their names and sizes, and a hash of samples of their content.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from diffscale.core import storage
from diffscale.core.errors import UserError
from diffscale.data.build import folders, sources
from diffscale.data.build.archives import zip_tree
from diffscale.data.build.items import Reading, SourceUnit, open_file
from diffscale.data.build.labels import LABELS_FILE
from diffscale.data.build.names import is_image, printable, shown
from diffscale.data.build.tasks import BuildPlan, content_of, load_json, load_unit, sum_of_contents
from diffscale.data.build.tree import Entry
from diffscale.data.format.manifest import read_manifest

SAMPLE = 64 << 10  # bytes of one sample
SAMPLES = 18  # both ends and 16 places between


@dataclass(frozen=True)
class Fingerprint:
    """The state of a source.

    files: images of a folder or zip, or files of another source
    bytes: of these
    listing: hash of names, sizes and, except for a folder, of the content
    times: hash of the times of the last change in a folder
    content: hash of a folder's content; empty until the build has read it
    """

    files: int
    bytes: int
    listing: str
    times: str = ""
    content: str = ""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def fingerprint(
    uri: str, kind: str, reading: Reading, files: Callable[[], Iterable[Entry]] | None = None
) -> Fingerprint:
    """Return the state of a source, without its content if it is a folder.

    files: lists the files of a folder, if they are known
    """
    listing, times = hashlib.sha256(), hashlib.sha256()
    count = size = 0
    for entry in _files(uri, kind, files):
        count, size = count + 1, size + entry.size
        listing.update(f"{printable(entry.name)}\0{entry.size}\0".encode())
        if kind == "folder":
            times.update(f"{entry.time}\0".encode())
        elif kind == "zip":
            listing.update(f"{entry.time}\0".encode())
        else:
            listing.update(_samples(entry.where, entry.size))
    if reading.labels:
        listing.update(storage.read_bytes(reading.labels))
    return Fingerprint(count, size, listing.hexdigest()[:32], times.hexdigest()[:32] if kind == "folder" else "")


def _files(uri: str, kind: str, files: Callable[[], Iterable[Entry]] | None) -> Iterator[Entry]:
    """Yield the files whose state counts, in a fixed order."""
    if kind in ("folder", "zip"):
        list_files = files or (lambda: folders.walk(uri) if kind == "folder" else zip_tree(uri).files())
        for entry in list_files():
            listed = is_image(entry.name) or entry.name.rsplit("/", 1)[-1] == LABELS_FILE
            if listed and not entry.problem:
                yield entry
    elif not sources.is_folder(uri):
        fs, path = storage.filesystem(uri)
        yield Entry(uri.rsplit("/", 1)[-1], uri, fs.get_file_info(path).size)
    else:
        ends = sources.ENDINGS.get(kind, ("",))
        yield from (e for e in folders.walk(uri) if e.name.endswith(ends) and not e.problem)


def _samples(uri: str, size: int) -> bytes:
    """Return a hash of samples of a file; of a small one, of the whole file."""
    digest = hashlib.sha256()
    with open_file(uri) as file:
        places = [i * max(size - SAMPLE, 0) // (SAMPLES - 1) for i in range(SAMPLES)]
        for place in sorted(set(places)):
            file.seek(place)
            digest.update(file.read(SAMPLE))
    return digest.digest()


def content_of_units(units: Iterable[SourceUnit]) -> str:
    """Return the content of a folder by reading all of its images."""
    return sum_of_contents(
        content_of(name, data) for unit in units for name, data, _ in sources.read_unit(unit) if isinstance(data, bytes)
    )


def check_finished(dataset: str, source: str, reading: Reading, show: bool) -> None:
    """Raise UserError if the source of a finished dataset has changed since it was built.

    A source that is gone cannot be compared, nor can a dataset of a version that noted no state.
    """
    noted = read_manifest(dataset).source
    before = noted.get("fingerprint")
    if not before or not all(storage.exists(place) for place in (source, reading.labels) if place):
        return
    fix = "choose another folder for the new dataset, or remove this one to build it again"
    if _is_same(source, before, fingerprint(source, noted["kind"], reading), dataset, fix):
        return
    if show:
        Console().print(f"files of {shown(source)} have other times: comparing their content", markup=False)
    listed = sources.open_source(source, 1000, Path(), replace(reading, kind=noted["kind"]))
    if content_of_units(listed.units) != before.get("content"):
        raise changed(source, "other content in files of the same size", dataset, fix)


def check_interrupted(work: Path, plan: BuildPlan, reading: Reading) -> None:
    """Raise UserError if the source has changed since an interrupted build listed it."""
    before = load_json(work / "fingerprint.json")
    if before is None:  # of an earlier version
        return
    fix = f"remove {work} to start again"
    if _is_same(plan.source, before, fingerprint(plan.source, plan.kind, reading), "its first part", fix):
        return
    for file in sorted((work / "done").glob("*.json")):
        read = (load_json(file) or {}).get("content")
        if read is not None and read != content_of_units([load_unit(work / "units" / file.name)]):
            raise changed(plan.source, "other content in files of the same size", "its first part", fix)


def _is_same(uri: str, before: dict[str, Any], now: Fingerprint, place: str, fix: str) -> bool:
    """Return whether a source has the files it had; False if the content must decide. Raises UserError if not.

    before: `to_json` of that time
    place: what was built of it
    """
    if (before["listing"], before["times"]) == (now.listing, now.times):
        return True
    if before["listing"] == now.listing:
        return False
    if (before["files"], before["bytes"]) == (now.files, now.bytes):
        raise changed(uri, "other files, or labels", place, fix)
    what = f"{now.files:,} files of {now.bytes:,} bytes, and had {before['files']:,} of {before['bytes']:,}"
    raise changed(uri, what, place, fix)


def changed(uri: str, what: str, place: str, fix: str) -> UserError:
    return UserError(
        setting="SOURCE",
        value=uri,
        expected=f"the source as it was when {place} was built",
        reason=f"it has {what}",
        fix=fix,
    )
