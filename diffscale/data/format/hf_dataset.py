"""Trains on Arrow or Parquet files of Hugging Face `datasets` without converting them.

Each image is decoded, centre-cropped and resized (LANCZOS) on access. Local Arrow files are memory-mapped, so any row
is cheap to find. Parquet is compressed in row groups, and the last used groups stay in memory: train on it with
`data.order=blocks`. A built dataset is faster in every epoch, and its images are all checked before training.

The `datasets` library is not used: it would be a large dependency with network access, and it does not validate the
offsets in a file.
"""

from __future__ import annotations

import bisect
import hashlib
import json
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from diffscale.core import storage
from diffscale.core.errors import UserError
from diffscale.data.build import decode
from diffscale.data.build.decode import ImageError, Preparation
from diffscale.data.format import hf_tables
from diffscale.data.format.dataset import Dataset
from diffscale.data.format.errors import ShardError
from diffscale.data.format.manifest import Manifest, Split, SplitName
from diffscale.data.format.shard import check_signature, signature

MARK = "#resolution="
KEPT_BYTES = 1 << 30  # upper bound on Parquet row groups in memory
SAMPLED = 64  # images from which mean and std are estimated
PREPARATION = Preparation(upsample=True)


def address(path: str, resolution: int | None) -> str:
    """Return a path with the resolution noted in it, for `open_dataset`."""
    return f"{path}{MARK}{resolution}" if resolution else path


def split_address(path: str) -> tuple[str, int | None]:
    """Return the path and the resolution of an `address`."""
    place, _, side = path.partition(MARK)
    return place, int(side) if side else None


class TableDataset(Dataset):
    """A Dataset over Arrow or Parquet files.

    `train` is the split of that name, `heldout` the splits named validation or test. `content_hash` covers samples of
    the files (size, both ends and 16 places between); mean, std, channels and lossy are estimated from 64 images. The
    files have no checksums to compare.

    place: folder or file, path or URI
    resolution: side in pixels; None is the shorter side of the first image
    split: `train` or `heldout`
    """

    def __init__(self, place: str, resolution: int | None, split: SplitName) -> None:
        self.place, self.fixed_resolution, self.split_name, self.cache = place, resolution, split, None
        self.path = address(place, resolution)
        self.tables = hf_tables.open_tables(place)
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
        self.class_names, self.num_classes = list(self.tables.class_names), len(self.tables.class_names)
        self.dtype = self.tables.latents[0] if self.tables.latents else "uint8"  # type: ignore[assignment]
        self._read_samples()
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
        return cls(*split_address(path), split)

    def __reduce__(self):
        return TableDataset.open_tables, (self.path, self.split_name)

    @cached_property
    def heldout(self) -> Dataset | None:
        if self.split_name == "heldout" or not any(part.split == "heldout" for part in self.tables.parts):
            return None
        return TableDataset(self.place, self.fixed_resolution, "heldout")

    @property
    def is_latent(self) -> bool:
        return self.tables.latents is not None

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

    def _image(self, data: Any) -> Any:
        if isinstance(data, np.ndarray):
            return decode.from_array(data, self._preparation)
        return decode.open_image(bytes(data), self._preparation).image

    def _group(self, group: int) -> tuple[Any, NDArray[np.int64]]:
        """Return images and labels of a row group or record batch; the last used groups of Parquet stay in memory."""
        found = self._kept.get(group)
        if found is None:
            part, number = self.groups[group]
            uri, columns = self.parts[part].uri, self.tables.columns
            names = [columns.image] + ([columns.label] if columns.label else [])
            table = hf_tables.read_group(uri, number, names)
            images = table[columns.image].combine_chunks()
            images = images.chunk(0) if isinstance(images, pa.ChunkedArray) else images
            numbers = self._numbers(table[columns.label].to_pylist() if columns.label else [0] * len(images))
            size = 0 if hf_tables.is_mapped(uri) else images.nbytes
            found = self._kept[group] = (images, numbers, size)
            self._kept_bytes += size
        self._kept.move_to_end(group)
        while self._kept_bytes > KEPT_BYTES and len(self._kept) > 1:
            self._kept_bytes -= self._kept.popitem(last=False)[1][2]
        return found[0], found[1]

    def _numbers(self, labels: list[Any]) -> NDArray[np.int64]:
        strings = self.tables.columns.strings
        if strings is not None:
            return np.array([bisect.bisect_left(strings, str(label)) for label in labels], np.int64)
        return np.array([-1 if label is None else label for label in labels], np.int64)

    def fetch(self, pieces: Sequence[int]) -> None:
        """Do nothing: a group is read when its rows are gathered."""

    def _check_unchanged(self, pieces: list[int]) -> None:
        for part in {self.groups[g][0] for g in pieces}:
            uri, opened = self.parts[part].uri, self._signatures[part]
            if opened is not None:
                check_signature(uri, opened)

    def _read_samples(self) -> None:
        """Set channels, resolution, lossy, mean and std from images spread over the dataset."""
        if self.tables.latents is not None:
            _, self.channels, self.resolution = self.tables.latents
            self.lossy, self._preparation = False, PREPARATION
        else:
            first = [data for data in self._some(8) if data is not None]
            opened = [None if isinstance(d, np.ndarray) else decode.open_image(bytes(d), PREPARATION) for d in first]
            grey = all(decode.is_grey(data) for data in first)
            self.channels = 1 if grey and first else 3
            self._preparation = Preparation(upsample=True, channels=1 if grey else 3)
            self.lossy = any(o is not None and o.lossy for o in opened)
            sizes = [min(d.shape[:2]) if o is None else min(o.image.size) for o, d in zip(opened, first, strict=True)]
            self.resolution = self.fixed_resolution or (sizes[0] if sizes else 64)
        self.mean, self.std = [0.0] * self.channels, [0.0] * self.channels
        sample = self.gather(self._spread(SAMPLED))[0].double()
        axes = (0, 2, 3) if self.is_latent else (0, 1, 2)
        self.mean, self.std = sample.mean(axes).tolist(), sample.std(axes, correction=0).tolist()

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
        for part in self.parts:
            fs, path = storage.filesystem(part.uri)
            with fs.open_input_file(path) as file:
                size = file.size()
                digest.update(json.dumps([part.uri.split("/")[-1], size]).encode())
                for place in np.linspace(0, max(0, size - 65536), 18).astype(int).tolist():
                    file.seek(place)
                    digest.update(file.read(65536))
        return digest.hexdigest()[:16]

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
