"""manifest.json: the content of a dataset folder and how it was made.

    DATASET/
      manifest.json
      train-00000.arrow ...      Arrow IPC files of one record batch: image, label, name
      heldout-00000.arrow ...    the same, if part of the data is held out
      rejected.csv               files of the source that were not used, and why

`image` is fixed_shape_tensor uint8 (H, W, C) for small images (layout `pixels`), binary PNG, WebP or JPEG for large
ones (`encoded`), or fixed_shape_tensor float16 / float32 (C, H, W) for latents (`latents`): as the source had them, or
mean and standard deviation of what an autoencoder encodes (`Encoding`).
"""

from __future__ import annotations

import hashlib
import json
from functools import lru_cache
from importlib import metadata
from typing import Any, Literal

import numpy as np
import PIL
from numpy.typing import ArrayLike
from pydantic import BaseModel, ConfigDict, Field, ValidationError

import diffscale
from diffscale.core import storage
from diffscale.core.errors import UserError

VERSION = 1
FILE = "manifest.json"
Layout = Literal["pixels", "encoded", "latents"]
SplitName = Literal["train", "heldout"]


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Shard(Strict):
    """One Arrow file. `content` is the ContentHash of its rows, `sha256` that of the file."""

    file: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*\.arrow$")
    rows: int = Field(gt=0)
    bytes: int = Field(gt=0)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    content: str = Field(pattern=r"^[0-9a-f]{64}$")


class Split(Strict):
    """Shards in row order.

    mean, std: per channel, of pixels in [0, 255] or of latents
    class_counts: images of each class; None for data without labels or built by an earlier version
    """

    rows: int = Field(ge=0)
    content_hash: str
    mean: list[float]
    std: list[float]
    class_counts: list[int] | None = None
    shards: list[Shard]


class Encoding(Strict):
    """How an autoencoder made the latents. A row is (mean - shift) * factors and std * factors, one after the other."""

    autoencoder: str = Field(description="folder or hub id of an AutoencoderKL of diffusers")
    revision: str = Field(description="commit of the hub's repository, empty for a folder")
    digest: str = Field(pattern=r"^[0-9a-f]{16}$", description="of its config and weights")
    scale: str = Field(description="name of the normalisation: sd or edm2")
    shift: list[float] = Field(description="of each channel")
    factors: list[float] = Field(description="of each channel")
    mirrored: bool = Field(description="a row also has mean and standard deviation of the mirrored image")
    image_resolution: int = Field(gt=0, description="side of the encoded images in pixels")
    images: str = Field(description="content hash of their training split")


class Manifest(Strict):
    format: Literal["diffscale-images"] = "diffscale-images"
    version: Literal[1] = 1
    layout: Layout
    dtype: Literal["uint8", "float16", "float32"]
    resolution: int = Field(gt=0)
    channels: int = Field(gt=0)
    class_names: list[str] = Field(description="empty if the images have no labels")
    content_hash: str = Field(description="of the training split: independent of how rows are divided into shards")
    lossy: bool = Field(description="some source image was stored lossily, which limits FID")
    lossy_images: int = Field(0, ge=0)
    rejected: int = Field(0, ge=0, description="source images that could not be used: rejected.csv")
    resize: dict[str, Any] = Field(description="crop, filter, background and other choices that made the pixels")
    source: dict[str, Any] = Field(description="where the images came from")
    made_with: dict[str, str] = Field(description="versions of diffscale, pyarrow and pillow")
    encoding: Encoding | None = Field(None, description="of latents that an autoencoder made")
    splits: dict[SplitName, Split]

    @property
    def stored_channels(self) -> int:
        """Channels of a row: of an image, of a latent, or of the latent's mean and standard deviation."""
        if self.encoding is None:
            return self.channels
        return self.channels * (4 if self.encoding.mirrored else 2)


def read_manifest(folder: str) -> Manifest:
    """Read and check a manifest. Raises UserError if the folder, its manifest or a count in it is invalid."""
    uri = storage.join(folder, FILE)
    try:
        data = storage.read_bytes(uri)
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(
            setting="data.path",
            value=folder,
            expected="a dataset folder with a manifest.json",
            fix="python -m diffscale.data build SOURCE DATASET makes one, or continues an interrupted build",
        ) from None
    try:
        manifest = Manifest.model_validate_json(data)
        for name, split in manifest.splits.items():
            if split.rows != sum(shard.rows for shard in split.shards):
                raise ValueError(f"splits.{name}.rows is {split.rows}, not the sum over its shards")
            if split.content_hash != split_hash(manifest, split.shards):
                raise ValueError(f"splits.{name}.content_hash does not follow from its shards")
            counts = split.class_counts
            if counts is not None and (
                len(counts) != len(manifest.class_names) or min(counts) < 0 or sum(counts) != split.rows
            ):
                raise ValueError(f"splits.{name}.class_counts does not fit the class names and the rows")
        if "train" not in manifest.splits or not manifest.splits["train"].rows:
            raise ValueError("there is no training split")
        if manifest.content_hash != manifest.splits["train"].content_hash:
            raise ValueError("content_hash is not that of the training split")
        if (encoding := manifest.encoding) is not None:
            if manifest.layout != "latents":
                raise ValueError(f"encoding belongs to latents, and the layout is {manifest.layout}")
            if not len(encoding.shift) == len(encoding.factors) == manifest.channels or 0 in encoding.factors:
                raise ValueError(
                    f"encoding has no shift and factor other than 0 for each of {manifest.channels} channels"
                )
    except (ValueError, ValidationError) as error:
        first = error.errors()[0] if isinstance(error, ValidationError) else None
        reason = f"{'.'.join(map(str, first['loc']))}: {first['msg']}" if first else str(error)
        raise UserError(
            setting="data.path",
            value=uri,
            expected=f"a valid manifest of version {VERSION}",
            reason=reason,
            fix="restore the file, or build the dataset again",
        ) from None
    return manifest


def write_manifest(folder: str, manifest: Manifest) -> None:
    """Write manifest.json. Call it last: a folder with a manifest is a complete dataset."""
    text = json.dumps(manifest.model_dump(), indent=1)
    storage.write_bytes(storage.join(folder, FILE), text.encode())


class ContentHash:
    """A hash of rows in order that can be joined: hash(A + B) follows from hash(A), hash(B) and len(B).

    Row digests are SHA-256 of (label, image bytes). The hash of the sequence is the polynomial with these digests as
    coefficients, modulo the prime 2^255 - 19. The identity of the data therefore does not depend on its shards.
    """

    PRIME = 2**255 - 19
    BASE = int.from_bytes(hashlib.sha256(b"diffscale content hash").digest(), "big") % PRIME

    def __init__(self, value: int = 0, rows: int = 0) -> None:
        self.value, self.rows = value, rows

    def add(self, image: Any, label: int) -> None:
        """Append one row; `image` is any buffer."""
        digest = hashlib.sha256(int(label).to_bytes(8, "little", signed=True))
        digest.update(image)
        self.value = (self.value * self.BASE + int.from_bytes(digest.digest(), "big")) % self.PRIME
        self.rows += 1

    def join(self, other: ContentHash) -> ContentHash:
        """Return the hash of these rows followed by the other's."""
        value = (self.value * _power(other.rows) + other.value) % self.PRIME
        return ContentHash(value, self.rows + other.rows)

    def hex(self) -> str:
        return f"{self.value:064x}"


@lru_cache(maxsize=1024)
def _power(rows: int) -> int:
    """Return BASE^rows: nearly all shards of a dataset have the same number of rows."""
    return pow(ContentHash.BASE, rows, ContentHash.PRIME)


def split_hash(manifest: Manifest, shards: list[Shard]) -> str:
    """Return the identity of a split: a hash of its rows and of the shape in which they are read, 16 hex digits."""
    return rows_hash(manifest.dtype, manifest.resolution, manifest.channels, shards)


def rows_hash(dtype: str, resolution: int, channels: int, shards: list[Shard]) -> str:
    """Return the `split_hash` of shards that have no manifest yet."""
    total = ContentHash()
    for shard in shards:
        total = total.join(ContentHash(int(shard.content, 16), shard.rows))
    text = json.dumps([VERSION, dtype, resolution, channels, total.rows, total.hex()])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def channel_statistics(sums: ArrayLike, squares: ArrayLike, values: int) -> tuple[list[float], list[float]]:
    """Return mean and standard deviation per channel.

    sums: (channels,), the sum of all values
    squares: (channels,), the sum of their squares
    values: values in each channel
    """
    mean = np.asarray(sums) / values
    return mean.tolist(), np.sqrt(np.maximum(np.asarray(squares) / values - mean**2, 0)).tolist()


def made_with() -> dict[str, str]:
    """Return the versions that a manifest notes."""
    return {"diffscale": diffscale.__version__, "pyarrow": metadata.version("pyarrow"), "pillow": PIL.__version__}
