"""Small real datasets, and ways to damage them."""

from __future__ import annotations

import io
import os
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from diffscale.data.format.manifest import Manifest, Split, rows_hash, write_manifest
from diffscale.data.format.shard import make_batch, write_shard


def pictures(n: int, side: int = 8, channels: int = 3, seed: int = 0) -> NDArray[np.uint8]:
    """Return random pixels (n, side, side, channels)."""
    return np.random.default_rng(seed).integers(0, 256, (n, side, side, channels), np.uint8)


def png(image: NDArray[np.uint8], form: str = "PNG", **settings) -> bytes:
    """Return the image as a file of this format."""
    out = io.BytesIO()
    Image.fromarray(image).save(out, form, **settings)
    return out.getvalue()


def write_dataset(folder: Path | str, images: NDArray, shards: int = 3, classes: int = 4) -> None:
    """Write a dataset folder of these pixels in several shards; row i has the class i % classes."""
    folder = str(folder)
    entries = []
    for s, rows in enumerate(np.array_split(np.arange(len(images)), shards)):
        batch = make_batch(images[rows], rows % classes, [f"image {i}" for i in rows])
        entries.append(write_shard(folder, f"train-{s:05d}.arrow", batch))
    side, channels = images.shape[1], images.shape[3]
    content = rows_hash("uint8", side, channels, entries)
    split = Split(rows=len(images), content_hash=content, mean=[0.0] * channels, std=[1.0] * channels, shards=entries)
    write_manifest(
        folder,
        Manifest(
            layout="pixels",
            dtype="uint8",
            resolution=side,
            channels=channels,
            class_names=[*map(str, range(classes))],
            content_hash=content,
            lossy=False,
            resize={},
            source={},
            made_with={},
            splits={"train": split},
        ),
    )


def damage(path: str, how: str) -> None:
    """Remove a file, or change it in place, so that a memory map sees it. how: missing, truncated or flipped."""
    if how == "missing":
        os.remove(path)
        return
    data = bytearray(Path(path).read_bytes())
    if how == "truncated":
        data = data[: len(data) // 2]
    else:
        data[len(data) // 2] ^= 1
    with open(path, "r+b") as file:
        file.write(data)
        file.truncate(len(data))
