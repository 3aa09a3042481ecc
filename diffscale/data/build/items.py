"""What the sources of a build share: images in units of work, the rules for their names, and errors.

A unit is a run of images from one place that one task turns into shards. An image's name decides whether it is held
out, and identifies it in rejected.csv.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pyarrow import fs as pafs

from diffscale.core import storage
from diffscale.core.errors import UserError
from diffscale.core.text import one_line
from diffscale.data.build.decode import MOST_BYTES, ImageError

Reader = Literal["files", "zip", "tar", "table", "array"]
Kind = Literal["auto", "folder", "zip", "tar", "table", "array", "cifar10"]
Label = int | str | None
Sample = tuple[str, Any, Label]


@dataclass(frozen=True)
class Item:
    """One image.

    name: unique in the source
    where: URI, member of a zip, or (offset, size) in a tar
    label: class name; None without labels
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


@dataclass(frozen=True)
class Reading:
    """The choices of a person where a source could be read in several ways; None leaves it to the source.

    labels: CSV of files and labels
    image_column: the column of the images of a table; in a tar their extension, for example `jpg`
    label_column: the column of the labels, of the CSV or of a table; in a tar `cls`, `txt` or `json.KEY`; or `none`
    config: the configuration of a Hugging Face dataset, or a pattern such as `*`
    split_names: `train=NAME,heldout=NAME`, or `none`
    folders: what each level of folders is, for example `*/split/class`
    """

    kind: Kind = "auto"
    labels: str | None = None
    image_column: str | None = None
    label_column: str | None = None
    config: str | None = None
    split_names: str | None = None
    folders: str | None = None


@dataclass
class BuildSource:
    """A listed source.

    kind: a `Kind` other than auto
    units: an iterator, so it can be consumed once
    class_names: None if they follow from the labels of all items
    refused: (name, reason) of images that cannot be used; grows while `units` is consumed
    left_out: (name, reason) of other files, that are no images of this source; grows while `units` is consumed
    notes: sentences for the plan that a person reads before the build; grows while `units` is consumed
    counts: {(split or None, class name or None): images} if `units` alone do not tell
    latents: (dtype, channels, resolution) of a source of floats
    work: local folder for unpacked archives
    files: lists the entries of a folder again, once `units` has begun
    group_bytes: size of the largest row group that must be read as a whole
    """

    kind: str
    units: Iterator[SourceUnit]
    class_names: list[str] | None = None
    refused: list[tuple[str, str]] = field(default_factory=list)
    left_out: list[tuple[str, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    counts: dict[tuple[str | None, str | None], int] | None = None
    latents: tuple[str, int, int] | None = None
    work: Path = Path()
    files: Callable[[], Iterable[Any]] | None = None
    group_bytes: int = 0


def open_file(uri: str) -> Any:
    """Open a seekable reader of a local or remote file."""
    fs, path = storage.filesystem(uri)
    return open(path, "rb") if isinstance(fs, pafs.LocalFileSystem) else fs.open_input_file(path)


def unreadable(uri: str, expected: str, error: Exception) -> UserError:
    return UserError(setting="SOURCE", value=uri, expected=expected, reason=one_line(error))


def check_size(size: int) -> None:
    if size > MOST_BYTES:
        raise ImageError(f"the file has more than {MOST_BYTES:,} bytes")
