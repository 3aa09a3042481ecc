"""Where images come from: a dataset, a model's samples (sampling.py), or files that no build has prepared.

Files are listed, read and decoded by the code of `data build`, with the choices of the dataset that they are compared
with. So a folder has the same pixels as the dataset built of it.
"""

from __future__ import annotations

import hashlib
import logging
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

import numpy as np
import torch
from torch import Tensor

from diffscale.core import storage
from diffscale.core.cache import cache_dir
from diffscale.core.errors import UserError
from diffscale.core.hashing import identify
from diffscale.core.progress import working
from diffscale.data import open_dataset
from diffscale.data.build import decode, sources
from diffscale.data.build.decode import ImageError, Preparation
from diffscale.data.build.items import Reading, SourceUnit
from diffscale.data.format.manifest import FILE

if TYPE_CHECKING:
    from diffscale.data import Dataset

log = logging.getLogger(__name__)
KINDS = ("folder", "zip", "tar", "array")
UNIT_ROWS = 1024  # images that are listed together
MOST_PIXELS = 64_000_000  # of one image

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


@dataclass(frozen=True)
class Listing:
    """The images of a folder, archive or array, in the order in which `data build` lists them.

    units: one image each.
    sizes: how many images are stored at each (width, height).
    content: hash of the images' bytes.
    lossy: whether one of them was stored lossily.
    """

    place: str
    units: list[SourceUnit]
    sizes: Counter[tuple[int, int]]
    content: str
    lossy: bool

    def size_of(self, wanted: set[tuple[int, int]]) -> str:
        """Return the name of the first image that has one of these sizes, with the size."""
        for unit in self.units:
            name, data = _read(unit)
            size = decode.read_header(data)[:2]
            if size in wanted:
                return f"{name} is {size[0]} x {size[1]}"
        raise LookupError(f"no image of {self.place} has one of the sizes {sorted(wanted)}")


@dataclass
class FileSource:
    """Images of a listing, decoded, cropped and resized as a build does it."""

    listing: Listing
    preparation: Preparation
    resolution: int  # side in pixels
    rows: np.ndarray  # int64, of the listing
    batch: int = 256

    @property
    def n(self) -> int:
        return len(self.rows)

    @property
    def lossy(self) -> bool:
        return self.listing.lossy

    @property
    def resized(self) -> int:
        """Images that are stored at another size than `resolution`: they are cropped and resized."""
        return sum(n for size, n in self.listing.sizes.items() if size != (self.resolution, self.resolution))

    @cached_property
    def content_hash(self) -> str:
        """Hash of the stored images and of how their pixels are made of them."""
        return identify(
            content=self.listing.content, preparation=self.preparation.recorded(), resolution=self.resolution
        )

    def select(self, rows: np.ndarray) -> FileSource:
        """Return the images at these rows, in that order."""
        return replace(self, rows=self.rows[rows])

    def images(self, first: int, last: int) -> tuple[Tensor, Tensor]:
        """Return images first … last−1. Raises UserError that names one that cannot be used."""
        pixels = np.stack([self._pixels(self.listing.units[row]) for row in self.rows[first:last]])
        return torch.from_numpy(pixels).permute(0, 3, 1, 2), torch.zeros(len(pixels), dtype=torch.long)

    def at(self, rows: np.ndarray) -> Tensor:
        return self.select(rows).images(0, len(rows))[0]

    def _pixels(self, unit: SourceUnit) -> np.ndarray:
        name, data = _read(unit)
        try:
            image = decode.decode(data, self.preparation).image
            return decode.to_array(decode.fit(image, self.resolution, self.preparation))
        except ImageError as error:
            raise _unusable(f"{self.listing.place}: {name}", error) from None


def is_dataset(place: str) -> bool:
    """Return whether a place is the folder of an Arrow dataset of diffscale."""
    return storage.exists(storage.join(place, FILE))


def open_images(place: str, work: Path, like: Dataset | None = None, resolution: int | None = None) -> Images:
    """Open an Arrow dataset of diffscale, or the images of a folder, .zip, .tar, .npz or .npy.

    Raises UserError for a place without images, an image that is damaged, and sizes that do not decide the pixels.

    work: local folder for unpacked archives and arrays.
    like: the dataset that the images are compared with, whose choices decide how they are decoded, cropped and resized.
        Square images of one size below its resolution keep that size.
    resolution: side in pixels to which the images are cropped and resized, without `like`. None: they are square and
        of one size.
    """
    if is_dataset(place):
        return open_dataset(place)
    listing = list_images(place, work)
    rows = np.arange(len(listing.units))
    if like is not None:
        preparation = _preparation_of(like)
        return FileSource(listing, preparation, _side_compared_with(listing, like, preparation), rows)
    if resolution is not None:
        return FileSource(listing, Preparation(max_pixels=MOST_PIXELS), resolution, rows)
    (width, height), *others = listing.sizes
    if others or width != height:
        raise UserError(
            setting="FOLDER",
            value=place,
            expected="square images of one size",
            reason=f"{_sizes(listing)}, and nothing says how to crop and resize them",
            fix=f"--resolution {min(width, height)} crops the middle square; or compare with a dataset, whose choices "
            f"they take: diffscale data build {place} DATASET --resolution {min(width, height)}",
        )
    return FileSource(listing, Preparation(crop="none", max_pixels=MOST_PIXELS), width, rows)


@contextmanager
def unpacked() -> Iterator[Path]:
    """Yield a folder of this process for what archives unpack to."""
    parent = cache_dir() / "unpacked"
    parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=parent) as folder:
        yield Path(folder)


def list_images(place: str, work: Path) -> Listing:
    """List a folder, archive or array as `data build` does, and read the header of every image.

    Raises UserError for a place without images, of a kind that must be built first, or with several splits, and for an
    image that is damaged.

    work: local folder for unpacked archives and arrays.
    """
    if not storage.exists(place):
        raise UserError(setting="FOLDER", value=place, expected="images on disk", reason="the path does not exist")
    found = sources.open_source(place, UNIT_ROWS, work, Reading())
    if found.kind not in KINDS or found.latents is not None:
        raise UserError(
            setting="FOLDER",
            value=place,
            expected="a folder of images, a .zip, .tar, .npz or .npy, or a dataset of diffscale",
            fix=f"diffscale data build {place} DATASET --resolution N, and then evaluate DATASET",
        )
    units = [single for unit in found.units for single in _singles(unit)]
    if not units:
        raise UserError(setting="FOLDER", value=place, expected="a folder with images, or an archive or array of them")
    splits = Counter(unit.split for unit in units)
    if len(splits) > 1:
        raise UserError(
            setting="FOLDER",
            value=place,
            expected="the images of one split",
            reason="it has " + " and ".join(f"{n:,} of {name or 'no split'}" for name, n in splits.items()),
            fix="name the folder of one of them",
        )
    digest, sizes, lossy = hashlib.sha256(), Counter[tuple[int, int]](), False
    with working(f"reading {place}", len(units)) as progress:
        for unit in units:
            name, data = _read(unit)
            try:
                width, height, was_lossy, _ = decode.read_header(data)
            except ImageError as error:
                raise _unusable(f"{place}: {name}", error) from None
            digest.update(f"{width} x {height}".encode() + hashlib.sha256(data).digest())
            sizes[width, height] += 1
            lossy |= was_lossy
            progress.advance()
    if found.refused:
        (name, reason), count = found.refused[0], len(found.refused)
        log.warning("%s: %d files are left out, as a build leaves them out: %s: %s ...", place, count, name, reason)
    return Listing(place, units, sizes, digest.hexdigest()[:16], lossy)


def select_images(images: Images, rows: np.ndarray) -> DatasetSource | FileSource:
    """Return the images at these rows of a dataset, folder or array, in that order."""
    return images.select(rows) if isinstance(images, FileSource) else DatasetSource(images, rows)


def _preparation_of(dataset: Dataset) -> Preparation:
    try:
        return Preparation.of(dataset.manifest.resize, dataset.channels)
    except (ValueError, TypeError) as error:
        raise UserError(
            setting="reference", value=dataset.path, expected="a dataset of images", reason=str(error)
        ) from None


def _side_compared_with(listing: Listing, like: Dataset, preparation: Preparation) -> int:
    """Return the side to which images are resized that are compared with a dataset."""
    small = {size for size in listing.sizes if min(size) < like.resolution}
    if not small or preparation.upsample:
        return like.resolution
    (width, height), *others = listing.sizes
    if not others and width == height:
        return width
    raise UserError(
        setting="FOLDER",
        value=listing.place,
        expected=f"images of at least {like.resolution} pixels, as in {like.path}, or square ones of one size",
        reason=listing.size_of(small),
    )


def _singles(unit: SourceUnit) -> Iterator[SourceUnit]:
    """Yield a unit of each image, so that any row can be read alone."""
    if unit.rows is None:
        yield from (replace(unit, items=[item]) for item in unit.items)
    else:
        yield from (replace(unit, rows=(row, row + 1)) for row in range(*unit.rows))


def _read(unit: SourceUnit) -> tuple[str, Any]:
    """Return the name of a unit's image, and its bytes or pixels. Raises UserError if it cannot be read."""
    ((name, data, _),) = sources.read_unit(unit)
    if isinstance(data, ImageError):
        raise _unusable(name, data)
    return name, data if isinstance(data, bytes) else np.ascontiguousarray(data)


def _sizes(listing: Listing) -> str:
    (common, n), *others = listing.sizes.most_common()
    text = f"{n:,} of {len(listing.units):,} images are {common[0]} x {common[1]}"
    return f"{text}, {listing.size_of({others[-1][0]})}" if others else text


def _unusable(name: str, error: ImageError) -> UserError:
    return UserError(
        setting="FOLDER",
        value=name,
        expected="a usable image",
        reason=str(error),
        fix="remove it, so that it is left out on purpose",
    )
