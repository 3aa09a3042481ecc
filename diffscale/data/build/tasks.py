"""One task of a build: a unit of source images to parts of the dataset, and neighbouring parts to a final shard.

Plain functions without Ray. A task's result is a small JSON file written last, so a killed task simply runs again.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from diffscale.core import storage
from diffscale.data.build import decode
from diffscale.data.build.decode import Decoded, Preparation, Unusable
from diffscale.data.build.read_unit import read_unit
from diffscale.data.build.sources import Item, Unit
from diffscale.data.build.split import is_held_out
from diffscale.data.format.manifest import Layout
from diffscale.data.format.shard import make_batch, write_shard
from diffscale.data.loading.order import permutation

SHUFFLE = (0, 5)  # key of the stored order
PART = 32 << 20  # bytes of the images of one file that a task writes
PIXELS_UP_TO = 128  # side; larger images are stored encoded
RAW = ("PNG", "WEBP", "JPEG")


@dataclass(frozen=True)
class Plan:
    """The choices of a build that decide what the dataset holds. A build that is taken up again must have the same.

    layouts: of each resolution, as text keys (JSON). split: share of images held out. shuffle: store the rows in a
    pseudo-random order instead of the source's.
    """

    source: str
    kind: str
    resolutions: list[int]
    layouts: dict[str, Layout]
    preparation: Preparation
    encoding: Literal["webp", "png"]
    split: float
    split_seed: int
    labels: str | None
    unit_rows: int
    shard_bytes: int
    shuffle: bool | None  # None until the kind of the source is known
    dtype: Literal["uint8", "float16", "float32"] = "uint8"
    group_bytes: int = 0  # of the largest compressed row group that a task reads

    def to_json(self) -> str:
        return json.dumps(asdict(self), sort_keys=True)

    @staticmethod
    def from_json(text: str) -> Plan:
        data = json.loads(text)
        data["preparation"]["background"] = tuple(data["preparation"]["background"])
        return Plan(**{**data, "preparation": Preparation(**data["preparation"])})


@dataclass
class Part:
    """Rows of one resolution and split, collected up to about PART bytes and then written to a file of their own.

    sums, squares: of all pixel values, per channel.
    """

    stem: Path
    channel_axis: int
    images: list[Any] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    held: int = 0
    files: list[tuple[str, int]] = field(default_factory=list)
    size: int = 0
    sums: Any = 0
    squares: Any = 0

    def add(self, stored: Any, pixels: NDArray[Any], label: int, name: str) -> None:
        self.images.append(stored)
        self.labels.append(label)
        self.names.append(name)
        values = np.moveaxis(pixels, self.channel_axis, -1).reshape(-1, pixels.shape[self.channel_axis])
        self.sums = self.sums + values.sum(0, dtype=np.float64)
        self.squares = self.squares + np.einsum("ic,ic->c", values, values, dtype=np.float64)
        self.held += len(stored) if isinstance(stored, bytes) else stored.nbytes
        if self.held >= PART:
            self.write()

    def write(self) -> None:
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
        rows = sum(rows for _, rows in self.files)
        return {"files": self.files, "rows": rows, "bytes": self.size,
                "sums": self.sums.tolist(), "squares": self.squares.tolist()}  # fmt: skip


def do_unit(work: str, index: int) -> dict[str, Any]:
    """Reads unit `index` of the work folder and writes its parts. Returns, and stores, what was done:
    {"parts": {"64-train": Part.summary()}, "rejected": [[name, reason]], "lossy", "seen"}."""
    folder = Path(work)
    plan = Plan.from_json((folder / "plan.json").read_text())
    classes = json.loads((folder / "classes.json").read_text())
    unit = load_unit(folder / "units" / f"{index:06d}.json")
    parts: dict[str, Part] = {}
    rejected: list[list[str]] = []
    lossy = seen = 0
    for name, data, label in read_unit(unit):
        seen += 1
        try:
            if isinstance(data, Unusable):
                raise data
            number = class_number(label, classes)
            split = unit.split or ("heldout" if is_held_out(name, plan.split, plan.split_seed) else "train")
            ways, was_lossy = prepare(data, plan)
        except Unusable as error:
            rejected.append([name, str(error)])
            continue
        lossy += was_lossy
        for resolution, (stored, pixels) in ways.items():
            if isinstance(stored, Unusable):
                rejected.append([name, f"{stored} (resolution {resolution})"])
                continue
            key = f"{resolution}-{split}"
            if key not in parts:
                parts[key] = Part(folder / "parts" / f"{key}-{index:06d}", 2 if plan.dtype == "uint8" else 0)
            parts[key].add(stored, pixels, number, name)
    for part in parts.values():
        part.write()
    summaries = {key: part.summary() for key, part in parts.items()}
    result: dict[str, Any] = {"parts": summaries, "rejected": rejected, "lossy": lossy, "seen": seen}
    storage.write_bytes(str(folder / "done" / f"{index:06d}.json"), json.dumps(result).encode())
    return result


def prepare(data: Any, plan: Plan) -> tuple[dict[int, tuple[Any, Any]], bool]:
    """One source image at every resolution: {side: (what is stored, its pixels)}, and whether the source was lossy.

    Raises Unusable for an image that no resolution can use; one that some cannot use has Unusable in its place.
    """
    if plan.dtype != "uint8":
        return _prepare_latent(data, plan), False
    raw = None
    if isinstance(data, np.ndarray):
        image = decode.from_array(data, plan.preparation)
        decoded = Decoded(image, False, False)
    else:
        raw = bytes(data)
        decoded = decode.open_image(raw, plan.preparation)
    ways: dict[int, tuple[Any, Any]] = {}
    for side in plan.resolutions:
        try:
            fitted = decode.fit(decoded.image, side, plan.preparation)
        except Unusable as error:
            ways[side] = (error, None)
            continue
        pixels = decode.to_array(fitted)
        if plan.layouts[str(side)] == "pixels":
            ways[side] = (pixels, pixels)
        elif raw is not None and decoded.plain and fitted is decoded.image and decoded.image.format in RAW:
            ways[side] = (raw, pixels)  # the file itself is the image: nothing is encoded again
        else:
            ways[side] = (decode.encode(fitted, plan.encoding), pixels)
    problems = [stored for stored, _ in ways.values() if isinstance(stored, Unusable)]
    if len(problems) == len(ways):
        raise problems[0]
    return ways, decoded.lossy


def _prepare_latent(data: Any, plan: Plan) -> dict[int, tuple[Any, Any]]:
    side = plan.resolutions[0]
    array = np.asarray(data)
    if array.shape != (plan.preparation.channels, side, side) or str(array.dtype) != plan.dtype:
        raise Unusable(f"it is {array.dtype} {array.shape}")
    if not np.isfinite(array).all():
        raise Unusable("it holds NaN or infinity")
    return {side: (array, array)}


def class_number(label: Any, classes: list[str]) -> int:
    """The place of the label among the class names; 0 where the data has none."""
    if not classes:
        return 0
    if isinstance(label, bool) or not isinstance(label, int | str):
        raise Unusable("it has no label")
    number = label if isinstance(label, int) else _places(tuple(classes)).get(label, -1)
    if not 0 <= number < len(classes):
        raise Unusable(f"its label {label!r} is none of the {len(classes)} classes")
    return number


_PLACES: dict[tuple[str, ...], dict[str, int]] = {}


def _places(classes: tuple[str, ...]) -> dict[str, int]:
    if classes not in _PLACES:
        _PLACES.clear()
        _PLACES[classes] = {name: i for i, name in enumerate(classes)}
    return _PLACES[classes]


def merge(work: str, job: dict[str, Any]) -> dict[str, Any]:
    """Writes one final shard of a dataset, as `merge_jobs` describes it, from the parts that hold its rows.

    Returns, and stores, its manifest entry.
    """
    files = json.loads(Path(job["parts"]).read_text())
    starts = np.cumsum([0, *(rows for _, rows in files)])
    rows = np.arange(job["first"], job["last"])
    if job["shuffle"]:
        rows = permutation(int(starts[-1]), *SHUFFLE).forward(rows)
    which = np.searchsorted(starts, rows, side="right") - 1
    labels, names = np.empty(len(rows), np.int64), np.empty(len(rows), object)
    images: Any = None
    for p in np.unique(which).tolist():  # one part at a time is open
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


def save_unit(file: Path, unit: Unit) -> None:
    storage.write_bytes(str(file), json.dumps(asdict(unit)).encode("utf-8", "surrogateescape"))


def load_unit(file: Path) -> Unit:
    data = json.loads(file.read_text("utf-8", "surrogateescape"))
    rows = tuple(data["rows"]) if data["rows"] else None
    return replace(Unit(**{**data, "rows": rows}), items=[Item(**item) for item in data["items"]])


def load_json(file: Path) -> dict[str, Any] | None:
    try:
        return json.loads(file.read_text())
    except (FileNotFoundError, ValueError):
        return None
