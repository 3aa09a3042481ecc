"""Where images come from: a dataset, a folder, an array, or a model's samples (sampling.py), behind one interface.

Reference and samples take the same path from here on.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TypeAlias

import numpy as np
import torch
from torch import Tensor

from diffscale.core import storage
from diffscale.core.errors import UserError
from diffscale.data import open_dataset
from diffscale.data.build.decode import IMAGE_SUFFIXES, ImageError, Preparation, open_image
from diffscale.evaluation.metrics.statistics import UNREADABLE

if TYPE_CHECKING:
    from diffscale.data import Dataset

LOSSY_SUFFIXES = (".jpg", ".jpeg", ".jp2", ".avif")
AS_BUILT = Preparation(max_pixels=64_000_000)

Images: TypeAlias = "Dataset | FileSource"


class ImageSource(Protocol):
    """n images, found by index."""

    @property
    def n(self) -> int: ...

    @property
    def batch(self) -> int:
        """Ranges begin at multiples of it."""

    def images(self, first: int, last: int) -> tuple[Tensor, Tensor]:
        """Return images first … last−1: uint8 (B,C,H,W) where they were made, and int64 labels (B,) on the CPU."""

    def at(self, rows: np.ndarray) -> Tensor:
        """Return the images with these indices: uint8 (B,C,H,W) on the CPU."""


@dataclass
class DatasetSource:
    """Images of an Arrow dataset at some rows."""

    dataset: Dataset
    rows: np.ndarray  # int64
    batch: int = 256

    @property
    def n(self) -> int:
        return len(self.rows)

    def images(self, first: int, last: int) -> tuple[Tensor, Tensor]:
        images, labels = self.dataset.gather(self.rows[first:last])
        return images.permute(0, 3, 1, 2), labels

    def at(self, rows: np.ndarray) -> Tensor:
        return self.dataset.gather(self.rows[rows])[0].permute(0, 3, 1, 2)


@dataclass
class FileSource:
    """Images of a folder, or of an .npz with `arr_0` (N,H,W,3) uint8 as ADM writes. All have one size."""

    files: list[Path]
    array: np.ndarray | None = None
    batch: int = 256
    lossy: bool = False

    @classmethod
    def open(cls, place: Path) -> FileSource:
        """Open a folder or an .npz. Raises UserError when there are no images."""
        if place.suffix == ".npz":
            try:
                with np.load(place, allow_pickle=False) as file:
                    array = np.asarray(file["arr_0"])
                if array.dtype != np.uint8 or array.ndim != 4 or array.shape[-1] not in (1, 3) or not len(array):
                    raise ValueError(f"arr_0 is {array.dtype} {array.shape}")
            except UNREADABLE as error:
                raise UserError(
                    setting="FOLDER",
                    value=str(place),
                    expected="an .npz with arr_0 (N,H,W,3) uint8",
                    reason=f"{type(error).__name__}: {error}",
                ) from None
            return cls([], array)
        files = sorted(p for p in place.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES)
        if not files:
            expected = f"a folder with images ({', '.join(sorted(IMAGE_SUFFIXES))})"
            raise UserError(setting="FOLDER", value=str(place), expected=expected)
        return cls(files, lossy=any(f.suffix.lower() in LOSSY_SUFFIXES for f in files))

    @property
    def n(self) -> int:
        return len(self.files) if self.array is None else len(self.array)

    @cached_property
    def content_hash(self) -> str:
        """Hash of the files' bytes, or of the array's."""
        digest = hashlib.sha256()
        for file in self.files:
            digest.update(hashlib.sha256(file.read_bytes()).digest())
        if self.array is not None:
            digest.update(np.ascontiguousarray(self.array).tobytes())
        return digest.hexdigest()[:16]

    @cached_property
    def resolution(self) -> int:
        """Side in pixels of the first image (the longer one)."""
        return max(self.images(0, 1)[0].shape[-2:])

    def select(self, rows: np.ndarray) -> FileSource:
        """Return the images at these rows, in that order."""
        array = None if self.array is None else self.array[rows]
        return FileSource([self.files[i] for i in rows] if self.files else [], array, self.batch, self.lossy)

    def images(self, first: int, last: int) -> tuple[Tensor, Tensor]:
        if self.array is not None:
            pixels = self.array[first:last]
        else:
            opened = [_read_image(f) for f in self.files[first:last]]
            sizes = {p.shape for p in opened}
            if len(sizes) > 1:
                expected = f"images of one size, found {sorted(s[:2] for s in sizes)[:3]}"
                raise UserError(setting="FOLDER", value=str(self.files[0].parent), expected=expected)
            pixels = np.stack(opened)
        return torch.from_numpy(pixels).permute(0, 3, 1, 2), torch.zeros(len(pixels), dtype=torch.long)

    def at(self, rows: np.ndarray) -> Tensor:
        return self.select(rows).images(0, len(rows))[0]


def open_images(place: str) -> Images:
    """Open an Arrow dataset of diffscale, a folder of images or an .npz with arr_0. Raises UserError otherwise."""
    if storage.is_remote(place) or (Path(place) / "manifest.json").exists():
        return open_dataset(place)
    return FileSource.open(Path(place))


def select_images(images: Images, rows: np.ndarray) -> DatasetSource | FileSource:
    """Return the images at these rows of a dataset, folder or array, in that order."""
    return images.select(rows) if isinstance(images, FileSource) else DatasetSource(images, rows)


def _read_image(file: Path) -> np.ndarray:
    """Return RGB (H,W,3) uint8, opened as a dataset's build opens it. Raises UserError that names an unusable file."""
    try:
        return np.asarray(open_image(file.read_bytes(), AS_BUILT).image)
    except (ImageError, OSError) as error:
        raise UserError(
            setting="FOLDER",
            value=str(file),
            expected=f"a readable image of at most {AS_BUILT.max_pixels:,} pixels",
            reason=str(error),
        ) from None
