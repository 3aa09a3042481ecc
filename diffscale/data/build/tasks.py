"""The tasks of a build: prepare a unit of source images as parts of the dataset, and merge parts into a shard.

Plain functions without Ray. A task's result is a small JSON file that is written last, so a killed task runs again.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from diffscale.core import storage
from diffscale.data.build import decode
from diffscale.data.build.decode import ImageError, Preparation
from diffscale.data.build.items import Item, SourceUnit
from diffscale.data.build.sources import read_unit
from diffscale.data.format.manifest import Layout
from diffscale.data.format.shard import make_batch, write_shard
from diffscale.data.loading.order import permutation

SHUFFLE = (0, 5)  # key of the stored order
PART_BYTES = 32 << 20  # images of one file that a task writes
KEPT_FORMATS = ("PNG", "WEBP", "JPEG")  # whose files are stored unchanged when no pixel changes


@dataclass(frozen=True)
class BuildPlan:
    """The choices that decide the content of a dataset. A build can only be continued with the same plan."""

    source: str  # absolute path or URI
    kind: str  # a `Kind`, or auto until the source is listed
    resolutions: list[int]  # pixels
    layouts: dict[str, Layout]  # of each resolution, which is text here (a JSON key)
    preparation: Preparation
    encoding: Literal["webp", "png"]  # lossless form of large resized images
    split: float  # share of images held out
    split_seed: int
    labels: str | None  # CSV of files and labels
    unit_rows: int  # images of one unit
    shard_bytes: int
    shuffle: bool | None  # store rows in a pseudo-random order; None until the kind of the source is known
    dtype: Literal["uint8", "float16", "float32"] = "uint8"
    group_bytes: int = 0  # of the largest compressed row group that a task reads

    reading: dict[str, str] = field(default_factory=dict)  # other choices about how the source is read
    split_train: bool = False  # `split` divides the training images of a source that has no others

    def to_json(self) -> str:
        """Return the plan as text. Without choices in `reading` it is the text of versions that had none."""
        data = asdict(self)
        for name in ("reading", "split_train"):
            if not data[name]:
                del data[name]
        return json.dumps(data, sort_keys=True)

    @staticmethod
    def from_json(text: str) -> BuildPlan:
        data = json.loads(text)
        data["preparation"]["background"] = tuple(data["preparation"]["background"])
        return BuildPlan(**{**data, "preparation": Preparation(**data["preparation"])})


@dataclass
class ShardPart:
    """Rows of one resolution and split, collected up to about PART_BYTES and then written to a file.

    stem: path of the files without their number
    channel_axis: of the pixel arrays
    sums, squares: (channels,), over all pixel values
    """

    stem: Path
    channel_axis: int
    images: list[Any] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    held: int = 0  # bytes in `images`
    files: list[tuple[str, int]] = field(default_factory=list)  # (name, rows)
    size: int = 0  # bytes of all files
    sums: Any = 0
    squares: Any = 0
    classes: Counter[int] = field(default_factory=Counter)  # rows of each class

    def add(self, stored: Any, pixels: NDArray[Any], label: int, name: str) -> None:
        """Append one row; write a file if enough rows are held."""
        self.images.append(stored)
        self.labels.append(label)
        self.classes[label] += 1
        self.names.append(name)
        values = np.moveaxis(pixels, self.channel_axis, -1).reshape(-1, pixels.shape[self.channel_axis])
        self.sums = self.sums + values.sum(0, dtype=np.float64)
        self.squares = self.squares + np.einsum("ic,ic->c", values, values, dtype=np.float64)
        self.held += len(stored) if isinstance(stored, bytes) else stored.nbytes
        if self.held >= PART_BYTES:
            self.write()

    def write(self) -> None:
        """Write the held rows as one file."""
        if not self.images:
            return
        images = self.images if isinstance(self.images[0], bytes) else np.stack(self.images)
        batch = make_batch(images, self.labels, self.names)
        file = self.stem.with_name(f"{self.stem.name}-{len(self.files):03d}.arrow")
        with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_file(sink, batch.schema) as writer:
            writer.write_batch(batch)
        self.files.append((file.name, len(self.names)))
        self.size += file.stat().st_size
        self.images, self.labels, self.names, self.held = [], [], [], 0

    def summary(self) -> dict[str, Any]:
        """Return what the end of the build needs to know, as JSON values."""
        return {
            "files": self.files,
            "rows": sum(rows for _, rows in self.files),
            "bytes": self.size,
            "sums": self.sums.tolist(),
            "squares": self.squares.tolist(),
            "classes": {str(label): count for label, count in self.classes.items()},
        }


def is_held_out(name: str, fraction: float, seed: int = 0) -> bool:
    """Return True for about `fraction` of all names. It depends on the name alone, so new images move no other one."""
    digest = hashlib.sha256(f"{seed}/{name}".encode("utf-8", "surrogateescape")).digest()
    return int.from_bytes(digest[:8], "big") < fraction * 2**64


def content_of(name: str, data: bytes) -> int:
    """Return the hash of one image file."""
    digest = hashlib.sha256(name.encode() + b"\0")
    digest.update(data)
    return int.from_bytes(digest.digest(), "big")


def sum_of_contents(contents: Iterable[int]) -> str:
    """Return a hash of files that does not depend on their order or on how they are divided into units."""
    return f"{sum(contents) % 2**256:064x}"


def do_unit(work: str, index: int) -> dict[str, Any]:
    """Read unit `index` of the work folder and write its parts. Return and store the result:
    {"parts": {"64-train": ShardPart.summary()}, "rejected": [[name, reason]], "lossy": images, "seen": images}, and for
    files of a folder "content", the sum of their `content_of`."""
    folder = Path(work)
    plan = BuildPlan.from_json((folder / "plan.json").read_text())
    classes = json.loads((folder / "classes.json").read_text())
    unit = load_unit(folder / "units" / f"{index:06d}.json")
    parts: dict[str, ShardPart] = {}
    rejected: list[list[str]] = []
    lossy = seen = 0
    contents: list[int] = []
    own_split = None if plan.split_train and unit.split == "train" else unit.split
    for name, data, label in read_unit(unit):
        seen += 1
        if unit.reader == "files" and isinstance(data, bytes):
            contents.append(content_of(name, data))
        try:
            if isinstance(data, ImageError):
                raise data
            number = class_number(label, classes)
            split = own_split or ("heldout" if is_held_out(name, plan.split, plan.split_seed) else "train")
            prepared, was_lossy = prepare(data, plan)
        except ImageError as error:
            rejected.append([name, str(error)])
            continue
        lossy += was_lossy
        for resolution, (stored, pixels) in prepared.items():
            if isinstance(stored, ImageError):
                rejected.append([name, f"{stored} (resolution {resolution})"])
                continue
            key = f"{resolution}-{split}"
            if key not in parts:
                parts[key] = ShardPart(folder / "parts" / f"{key}-{index:06d}", 2 if plan.dtype == "uint8" else 0)
            parts[key].add(stored, pixels, number, name)
    for part in parts.values():
        part.write()
    summaries = {key: part.summary() for key, part in parts.items()}
    result: dict[str, Any] = {"parts": summaries, "rejected": rejected, "lossy": lossy, "seen": seen}
    if unit.reader == "files":
        result["content"] = sum_of_contents(contents)
    storage.write_bytes(str(folder / "done" / f"{index:06d}.json"), json.dumps(result).encode())
    return result


def prepare(data: Any, plan: BuildPlan) -> tuple[dict[int, tuple[Any, Any]], bool]:
    """Prepare one source image at every resolution.

    data: bytes of a file, pixels (H, W[, C]) uint8, or a latent (C, H, W)

    Returns {side: (what is stored, its pixels)} and whether the source was lossy. A resolution that cannot use the
    image has an ImageError in place of what is stored. Raises ImageError if no resolution can.
    """
    if plan.dtype != "uint8":
        return _prepare_latent(data, plan), False
    raw = None if isinstance(data, np.ndarray) else bytes(data)
    decoded = decode.decode(data if raw is None else raw, plan.preparation)
    prepared: dict[int, tuple[Any, Any]] = {}
    for side in plan.resolutions:
        try:
            fitted = decode.fit(decoded.image, side, plan.preparation)
        except ImageError as error:
            prepared[side] = (error, None)
            continue
        pixels = decode.to_array(fitted)
        if plan.layouts[str(side)] == "pixels":
            prepared[side] = (pixels, pixels)
        elif raw is not None and decoded.plain and fitted is decoded.image and decoded.image.format in KEPT_FORMATS:
            prepared[side] = (raw, pixels)  # the file itself: no pixel changed
        else:
            prepared[side] = (decode.encode(fitted, plan.encoding), pixels)
    problems = [stored for stored, _ in prepared.values() if isinstance(stored, ImageError)]
    if len(problems) == len(prepared):
        raise problems[0]
    return prepared, decoded.lossy


def _prepare_latent(data: Any, plan: BuildPlan) -> dict[int, tuple[Any, Any]]:
    side = plan.resolutions[0]
    array = np.asarray(data)
    if array.shape != (plan.preparation.channels, side, side) or str(array.dtype) != plan.dtype:
        raise ImageError(f"it is {array.dtype} {array.shape}")
    if not np.isfinite(array).all():
        raise ImageError("it holds NaN or infinity")
    return {side: (array, array)}


def class_number(label: Any, classes: list[str]) -> int:
    """Return the index of the label among the class names; 0 for data without classes."""
    if not classes:
        return 0
    if isinstance(label, bool) or not isinstance(label, int | str):
        raise ImageError("it has no label")
    number = label if isinstance(label, int) else _indices(tuple(classes)).get(label, -1)
    if not 0 <= number < len(classes):
        raise ImageError(f"its label {label!r} is none of the {len(classes)} classes")
    return number


@lru_cache(maxsize=1)
def _indices(classes: tuple[str, ...]) -> dict[str, int]:
    return {name: i for i, name in enumerate(classes)}


def merge(work: str, job: dict[str, Any]) -> dict[str, Any]:
    """Write one shard of the dataset from the parts that hold its rows; `job` is one of `finalize.merge_jobs`.

    Returns and stores the shard's manifest entry.
    """
    files = json.loads(Path(job["parts"]).read_text())
    starts = np.cumsum([0, *(rows for _, rows in files)])
    rows = np.arange(job["first"], job["last"])
    if job["shuffle"]:
        rows = permutation(int(starts[-1]), *SHUFFLE).forward(rows)
    which = np.searchsorted(starts, rows, side="right") - 1
    labels, names = np.empty(len(rows), np.int64), np.empty(len(rows), object)
    images: Any = None
    for p in np.unique(which).tolist():  # with one part open at a time
        part = pa.ipc.open_file(pa.memory_map(str(Path(work) / "parts" / files[p][0]))).get_batch(0)
        places = np.flatnonzero(which == p)
        chosen = pa.array(rows[places] - starts[p])
        labels[places] = part.column("label").take(chosen).to_numpy()
        names[places] = part.column("name").take(chosen).to_numpy(zero_copy_only=False)
        column = part.column("image")
        if isinstance(column, pa.ExtensionArray):
            pixels = column.to_numpy_ndarray()
            images = np.empty((len(rows), *pixels.shape[1:]), pixels.dtype) if images is None else images
            images[places] = pixels[chosen.to_numpy()]
        else:
            images = [b""] * len(rows) if images is None else images
            for place, row in zip(places.tolist(), chosen.to_pylist(), strict=True):
                images[place] = column[row].as_py()
    batch = make_batch(images, labels, names.tolist())
    del images  # Arrow has its own copy of encoded images
    entry = write_shard(job["target"], job["shard"], batch).model_dump()
    storage.write_bytes(job["done"], json.dumps(entry).encode())
    return entry


def save_unit(file: Path, unit: SourceUnit) -> None:
    """Write a unit as JSON."""
    storage.write_bytes(str(file), json.dumps(asdict(unit)).encode("utf-8", "surrogateescape"))


def load_unit(file: Path) -> SourceUnit:
    """Read a unit that `save_unit` wrote."""
    data = json.loads(file.read_text("utf-8", "surrogateescape"))
    rows = tuple(data["rows"]) if data["rows"] else None
    return replace(SourceUnit(**{**data, "rows": rows}), items=[Item(**item) for item in data["items"]])


def load_json(file: Path) -> dict[str, Any] | None:
    """Read a JSON file; None if it is missing or incomplete."""
    try:
        return json.loads(file.read_text())
    except (FileNotFoundError, ValueError):
        return None
