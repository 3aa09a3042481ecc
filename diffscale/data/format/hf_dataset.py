"""Trains on Arrow or Parquet files of Hugging Face `datasets` without converting them.

Each image is decoded, centre-cropped and resized (LANCZOS) on access. Local Arrow files are memory-mapped, so any row
is cheap to find. Parquet is compressed in row groups, and the last used groups stay in memory: train on it with
`data.order=blocks`. A built dataset is faster in every epoch, and its images are all checked before training.

What a run depends on is not guessed from a few rows. Labels are read in full when a dataset is opened. Images are too
many for that: those looked at decide whether a dataset is grey, and each image is checked when it is used. A colour
image in a grey dataset, or one of another size where no resolution was given, is refused.

The `datasets` library is not used: it would be a large dependency with network access, and it does not validate the
offsets in a file.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from PIL import Image

from diffscale.core import storage
from diffscale.core.errors import UserError
from diffscale.data.build import decode
from diffscale.data.build.decode import ImageError, Preparation
from diffscale.data.format import hf_columns, hf_tables
from diffscale.data.format.dataset import Dataset
from diffscale.data.format.errors import ShardError
from diffscale.data.format.hf_choices import Choices
from diffscale.data.format.hf_labels import LabelError
from diffscale.data.format.manifest import Manifest, Split, SplitName
from diffscale.data.format.shard import check_signature, signature

log = logging.getLogger(__name__)
MARK = "#resolution="
KEPT_BYTES = 1 << 30  # upper bound on Parquet row groups in memory
SAMPLED = 64  # images that are looked at when a dataset is opened
PREPARATION = Preparation(upsample=True)
NO_CHOICES = Choices()


def address(path: str, resolution: int | None, choices: Choices = NO_CHOICES) -> str:
    """Return a path with the resolution and the choices noted in it, for `open_dataset`."""
    notes = "&".join(filter(None, (str(resolution or ""), choices.to_text())))
    return f"{path}{MARK}{notes if resolution else '&' + notes}" if notes else path


def split_address(path: str) -> tuple[str, int | None, Choices]:
    """Return the path, the resolution and the choices of an `address`."""
    place, _, notes = path.partition(MARK)
    side, _, choices = notes.partition("&")
    return place, int(side) if side else None, Choices.from_text(choices)


@lru_cache(maxsize=64)
def _tell(text: str) -> None:
    """Log a warning, once in each process."""
    log.warning(text)


class TableDataset(Dataset):
    """A Dataset over Arrow or Parquet files.

    `train` is the split of that name, `heldout` the splits named validation or test. `content_hash` covers samples of
    the files (size, both ends and 16 places between) and choices other than the first columns that fit; mean, std and
    lossy are estimated from 64 images. The files have no checksums to compare.

    place: folder or file, path or URI
    resolution: side in pixels; None is the shorter side of all images
    split: `train` or `heldout`
    choices: among several readings of the files
    train: the training split of the same files, if it is open; held-out images have its colours and resolution

    Raises UserError for a split that does not exist, and for rows without a label among rows with one.
    """

    def __init__(
        self,
        place: str,
        resolution: int | None,
        split: SplitName,
        choices: Choices = NO_CHOICES,
        train: TableDataset | None = None,
    ) -> None:
        self.place, self.fixed_resolution, self.split_name, self.cache = place, resolution, split, None
        self.choices, self.path = choices, address(place, resolution, choices)
        self.tables: hf_tables.Tables = train.tables if train else hf_tables.open_tables(place, choices)
        self._check_labels()
        if self.tables.left_out and split == "train":
            file, reason = self.tables.left_out[0]
            _tell(f"{place}: {len(self.tables.left_out):,} files are not used; {file.rsplit('/', 1)[-1]}: {reason}")
        if split == "heldout" and train is None:
            train = TableDataset(place, resolution, "train", choices)
        self.parts = [part for part in self.tables.parts if part.split == split]
        if not sum(part.rows for part in self.parts):
            raise UserError(setting="split", value=split, expected=f"a split of {place}")
        self.groups = [(p, g) for p, part in enumerate(self.parts) for g in range(len(part.groups))]
        counts = [rows for part in self.parts for rows in part.groups]
        self.starts = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])
        self.n = int(self.starts[-1])
        self.block_rows = int(np.median(counts))
        largest = max(part.largest for part in self.parts)
        self.window = max(1, KEPT_BYTES // (2 * largest))  # a block may lie in two groups
        self._signatures = [signature(part.uri) if not storage.is_remote(part.uri) else None for part in self.parts]
        self._kept: OrderedDict[int, tuple[Any, NDArray[np.int64], int]] = OrderedDict()
        self._kept_bytes = 0
        self.class_names = list(self.tables.classes.names) if split in self.tables.labels else []
        self.num_classes = len(self.class_names)
        self.dtype = self.tables.latents[0] if self.tables.latents else "uint8"  # type: ignore[assignment]
        self._read_samples(train)
        self.content_hash = self._fingerprint()
        self.manifest = Manifest(
            layout="latents" if self.tables.latents else "encoded",
            dtype=self.dtype,
            resolution=self.resolution,
            channels=self.channels,
            class_names=self.class_names,
            content_hash=self.content_hash,
            lossy=self.lossy,
            resize=PREPARATION.recorded(),
            source={"path": place, "kind": "huggingface"},
            made_with={},
            splits={split: Split(rows=self.n, content_hash=self.content_hash, mean=self.mean, std=self.std, shards=[])},
        )
        self.split = self.manifest.splits[split]

    @classmethod
    def open_tables(cls, path: str, split: SplitName) -> TableDataset:
        """Open an `address`. Raises UserError if the split or a column of images is missing."""
        place, resolution, choices = split_address(path)
        return cls(place, resolution, split, choices)

    def __reduce__(self):
        return TableDataset.open_tables, (self.path, self.split_name)

    @cached_property
    def heldout(self) -> Dataset | None:
        if self.split_name == "heldout" or not any(part.split == "heldout" for part in self.tables.parts):
            return None
        return TableDataset(self.place, self.fixed_resolution, "heldout", self.choices, self)

    @cached_property
    def class_counts(self) -> tuple[int, ...]:
        return self.tables.labels[self.split_name].counts if self.num_classes else ()

    def _check_labels(self) -> None:
        for split, labels in self.tables.labels.items():
            bad = labels.unlabelled + labels.unknown
            if bad:
                raise UserError(
                    setting=self.choices.option("label_column"),
                    value=self.tables.columns.label,
                    expected=f"a class for every image of {self.place}",
                    reason=f"{bad:,} of {bad + sum(labels.counts):,} rows of the split {split} have none, or one that "
                    f"is none of the {len(labels.counts)} classes",
                    fix="diffscale data build leaves these rows out; data.label_column=none uses no classes",
                )

    @property
    def is_latent(self) -> bool:
        return self.tables.latents is not None

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Shape of one row: (H, W, C) for pixels; (C, H, W) for latents, which tables hold without deviations."""
        side = self.resolution
        return (self.channels, side, side) if self.is_latent else (side, side, self.channels)

    def _fill(
        self,
        indices: NDArray[np.int64],
        which: NDArray[np.int64],
        pieces: list[int],
        pixels: NDArray[Any],
        labels: NDArray[np.int64],
    ) -> None:
        for group in pieces:  # one row group at a time is in memory
            images, numbers = self._group(group)
            places = np.flatnonzero(which == group)
            rows = (indices[places] - self.starts[group]).tolist()

            def one(place: int, row: int, group: int = group, images: Any = images) -> None:
                self._decode(hf_tables.image_bytes(images, row), pixels[place], group, row)

            self._in_threads(one, places.tolist(), rows)
            labels[places] = numbers[rows]
        if len(labels) and not 0 <= labels.min() <= labels.max() < max(1, self.num_classes):
            raise ShardError(self.place, f"a row has no label, or one outside the {self.num_classes} classes")

    def _decode(self, data: Any, out: NDArray[Any], group: int, row: int) -> None:
        try:
            if data is None:
                raise ImageError("the row has no image bytes")
            if self.is_latent:
                out[...] = data
            else:
                decode.copy_pixels(decode.fit(self._image(data), self.resolution, self._preparation), out)
        except ImageError as error:
            raise ShardError(self.parts[self.groups[group][0]].uri, f"its row {row} is unusable ({error})") from None

    def _image(self, data: Any) -> Image.Image:
        """Return the image in the dataset's colours. Raises UserError for one that does not fit the others."""
        if isinstance(data, np.ndarray):
            image, converted = decode.from_array(data, self._preparation), data.ndim == 3 and data.shape[2] > 1
        else:
            decoded = decode.open_image(bytes(data), self._preparation)
            image, converted = decoded.image, not decoded.plain
        if self.channels == 1 and self.choices.channels is None and converted and not decode.read_header(data).grey:
            raise UserError(
                setting="data.channels",
                value=None,
                expected="3 (all images as RGB) or 1 (all as grey)",
                reason=f"{self.place} has grey images and images in colour",
                fix="data.channels=3",
            )
        if self.fixed_resolution is None and min(image.size) != self.resolution:
            raise UserError(
                setting="data.resolution",
                value=None,
                expected="a side in pixels to which all images are resized",
                reason=f"the images of {self.place} have other shorter sides: {self.resolution} and {min(image.size)}",
                fix=f"data.resolution={min(self.resolution, min(image.size))}",
            )
        return image

    def _group(self, group: int) -> tuple[Any, NDArray[np.int64]]:
        """Return images and labels of a row group or record batch; the last used groups of Parquet stay in memory."""
        found = self._kept.get(group)
        if found is None:
            part, number = self.groups[group]
            uri, columns = self.parts[part].uri, self.tables.columns
            table = hf_tables.read_group(uri, number, columns.names if self.num_classes else [columns.image])
            images = table[columns.image].combine_chunks()
            images = images.chunk(0) if isinstance(images, pa.ChunkedArray) else images
            numbers = np.zeros(len(images), np.int64)
            if self.num_classes:
                try:
                    numbers = self.tables.classes.numbers(table[columns.label])
                except LabelError as error:
                    raise ShardError(uri, f"its labels have changed ({error})") from None
            size = 0 if hf_tables.is_mapped(uri) else images.nbytes
            found = self._kept[group] = (images, numbers, size)
            self._kept_bytes += size
        self._kept.move_to_end(group)
        while self._kept_bytes > KEPT_BYTES and len(self._kept) > 1:
            self._kept_bytes -= self._kept.popitem(last=False)[1][2]
        return found[0], found[1]

    def fetch(self, pieces: Sequence[int]) -> None:
        """Do nothing: a group is read when its rows are gathered."""

    def _check_unchanged(self, pieces: list[int]) -> None:
        for part in {self.groups[g][0] for g in pieces}:
            uri, opened = self.parts[part].uri, self._signatures[part]
            if opened is not None:
                check_signature(uri, opened)

    def _read_samples(self, train: TableDataset | None) -> None:
        """Set channels, resolution, lossy, mean and std from images spread over the dataset, or from `train`."""
        if self.tables.latents is not None:
            _, self.channels, self.resolution = self.tables.latents
            self.lossy, self._preparation = False, PREPARATION
        else:
            headers = list(self._headers())
            grey = bool(headers) and all(header.grey for header in headers)
            self.channels = train.channels if train else self.choices.channels or (1 if grey else 3)
            self._preparation = Preparation(upsample=True, channels=1 if self.channels == 1 else 3)
            self.lossy = any(header.lossy for header in headers)
            side = train.resolution if train else next((min(h.width, h.height) for h in headers), 64)
            self.resolution = self.fixed_resolution or side
        self.mean, self.std = [0.0] * self.channels, [0.0] * self.channels
        sample = self.gather(self._spread(SAMPLED))[0].double()
        axes = (0, 2, 3) if self.is_latent else (0, 1, 2)
        self.mean, self.std = sample.mean(axes).tolist(), sample.std(axes, correction=0).tolist()

    def _headers(self) -> Iterator[decode.Header]:
        """Yield the headers of some images. One that cannot be read is refused when it is used."""
        for data in self._some(SAMPLED):
            with suppress(ImageError):
                if data is not None:
                    yield decode.read_header(data)

    def _spread(self, count: int) -> NDArray[np.int64]:
        """Return rows spread over at most four groups: opening a Parquet dataset must read little."""
        groups = np.unique(np.linspace(0, len(self.groups) - 1, 4).astype(int))
        each = [np.linspace(self.starts[g], self.starts[g + 1] - 1, max(1, count // len(groups))) for g in groups]
        return np.unique(np.concatenate(each).astype(np.int64))

    def _some(self, count: int) -> Iterator[Any]:
        for row in self._spread(count).tolist():
            group = int(np.searchsorted(self.starts, row, side="right") - 1)
            yield hf_tables.image_bytes(self._group(group)[0], row - int(self.starts[group]))

    def _fingerprint(self) -> str:
        digest = hashlib.sha256(json.dumps([self.resolution, self.channels, self.dtype]).encode())
        digest.update(json.dumps(unusual).encode() if (unusual := self._unusual_choices()) else b"")
        for part in self.parts:
            fs, path = storage.filesystem(part.uri)
            with fs.open_input_file(path) as file:
                size = file.size()
                digest.update(json.dumps([part.uri.split("/")[-1], size]).encode())
                for place in np.linspace(0, max(0, size - 65536), 18).astype(int).tolist():
                    file.seek(place)
                    digest.update(file.read(65536))
        return digest.hexdigest()[:16]

    def _unusual_choices(self) -> list[Any]:
        """Return what the files alone do not say: columns other than the first that fit, and numbers with gaps."""
        columns, names = self.tables.columns, self.tables.classes.names
        first = hf_columns.first_columns(self.tables.schema)
        chosen = [columns.image, columns.label] if (columns.image, columns.label) != (first.image, first.label) else []
        counted = self.tables.classes.kind != "numbers" or names == tuple(map(str, range(len(names))))
        gaps = [] if counted else list(names)
        return [chosen, gaps] if chosen or gaps else []

    def local_shards(self) -> list[tuple[str, str]]:
        return []

    def check_files(self) -> None:
        for part in self.parts:
            if not storage.exists(part.uri):
                raise ShardError(part.uri, "it is missing")

    def name(self, row: int) -> str:
        group = int(np.searchsorted(self.starts, row, side="right") - 1)
        part, _ = self.groups[group]
        return f"{self.parts[part].uri}:{row}"
