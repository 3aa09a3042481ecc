"""Writes generated samples as numbered PNG files, an Arrow dataset of `diffscale.data`, or ADM's sample archive."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from diffscale.core import storage
from diffscale.core.errors import UserError
from diffscale.data.format.manifest import (
    Manifest,
    Shard,
    Split,
    channel_statistics,
    made_with,
    rows_hash,
    write_manifest,
)
from diffscale.data.format.shard import make_batch, write_shard
from diffscale.evaluation.distribute import Columns, kept_images

FORMATS = ("png", "arrow", "npz")
NOTE, CHUNK = "shard-", "chunk-"
CLAIM = "samples.json"  # what made the samples of the folder


class SampleWriter:
    """Writer of samples: an Evaluator's `keep_images`. Call `close()` after the last chunk.

    folder: absolute.
    file_format: png, arrow or npz (one file of all images, that guided-diffusion's evaluator reads).
    shape: (C,H,W) of an image.
    source: description of the generator, for an Arrow dataset's manifest.
    """

    def __init__(
        self, folder: Path, file_format: str, shape: tuple[int, int, int], class_names: list[str], source: dict
    ) -> None:
        if file_format not in FORMATS:
            raise UserError(setting="keep-format", value=file_format, expected=" or ".join(FORMATS))
        self.folder, self.shape, self.class_names, self.source = folder, shape, class_names, source
        self._claim(json.dumps({"format": file_format, "shape": list(shape), **source}, sort_keys=True))
        self._write: Callable[[int, np.ndarray, np.ndarray], None] = getattr(self, f"_write_{file_format}")

    def _claim(self, description: str) -> None:
        """Note what the folder holds. Raises UserError if it holds samples of something else: they would be mixed."""
        note = self.folder / CLAIM
        if note.exists() and note.read_text() != description:
            raise UserError(
                setting="folder",
                value=str(self.folder),
                expected="a folder without samples, or with those of the same weights and sampler",
                fix="choose another folder, or remove this one",
            )
        storage.write_bytes(str(note), description.encode())

    def __call__(self, first: int, columns: Columns) -> None:
        """Write the images of a chunk. Files are complete when it returns; writing them again changes nothing."""
        self._write(first, *kept_images(columns, self.shape))

    def _write_png(self, first: int, images: np.ndarray, labels: np.ndarray) -> None:
        for i, image in enumerate(images):
            buffer = io.BytesIO()
            Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(buffer, "PNG")
            storage.write_bytes(str(self.folder / f"{first + i:06d}.png"), buffer.getvalue())

    def _write_arrow(self, first: int, images: np.ndarray, labels: np.ndarray) -> None:
        names = [f"{first + i:06d}" for i in range(len(images))]
        labels = labels if self.class_names else np.zeros_like(labels)
        batch = make_batch(images, labels, names)
        shard = write_shard(str(self.folder), f"train-{first:09d}.arrow", batch)
        pixels = images.reshape(-1, self.shape[0]).astype(np.float64)
        sums = [pixels.sum(0).tolist(), np.square(pixels).sum(0).tolist(), len(pixels)]
        # Next to the shard until the end, so that an interrupted run still knows the shards that it wrote.
        note = json.dumps({"shard": shard.model_dump(), "sums": sums}).encode()
        storage.write_bytes(str(self.folder / f"{NOTE}{first:09d}.json"), note)

    def _write_npz(self, first: int, images: np.ndarray, labels: np.ndarray) -> None:
        buffer = io.BytesIO()
        np.savez(buffer, images=images, labels=labels)
        storage.write_bytes(str(self.folder / f"{CHUNK}{first:09d}.npz"), buffer.getvalue())

    def _join_chunks(self) -> None:
        """Write samples_NxHxWxC.npz: arr_0 uint8 (N,H,W,C) and, with classes, arr_1 int64 (N,), one chunk in memory."""
        files = sorted(self.folder.glob(f"{CHUNK}*.npz"))
        if not files:
            return
        labels = [np.load(file, allow_pickle=False)["labels"] for file in files]
        (channels, height, width), n = self.shape, sum(map(len, labels))
        target = self.folder / f"samples_{n}x{height}x{width}x{channels}.npz"
        temporary = target.with_suffix(".tmp")
        with zipfile.ZipFile(temporary, "w") as archive:
            with archive.open("arr_0.npy", "w", force_zip64=True) as member:
                header = {"descr": "|u1", "fortran_order": False, "shape": (n, height, width, channels)}
                np.lib.format.write_array_header_1_0(member, header)
                for file in files:
                    member.write(np.load(file, allow_pickle=False)["images"].tobytes())
            if self.class_names:
                with archive.open("arr_1.npy", "w") as member:
                    np.lib.format.write_array(member, np.concatenate(labels).astype(np.int64), allow_pickle=False)
        temporary.replace(target)
        for file in files:
            file.unlink()

    def close(self) -> None:
        """Write the manifest of an Arrow dataset, or ADM's archive; nothing for PNG."""
        self._join_chunks()
        files = sorted(self.folder.glob(f"{NOTE}*.json"))
        if not files:
            return
        notes = [json.loads(file.read_bytes()) for file in files]
        shards = [Shard.model_validate(note["shard"]) for note in notes]
        channels, side, _ = self.shape
        total, squares, count = (np.sum([note["sums"][i] for note in notes], axis=0) for i in range(3))
        mean, std = channel_statistics(total, squares, int(count))
        identity = rows_hash("uint8", side, channels, shards)
        rows = sum(s.rows for s in shards)
        split = Split(rows=rows, content_hash=identity, mean=mean, std=std, shards=shards)
        manifest = Manifest(
            layout="pixels",
            dtype="uint8",
            resolution=side,
            channels=channels,
            class_names=self.class_names,
            content_hash=identity,
            lossy=False,
            resize={},
            source=self.source,
            made_with=made_with(),
            splits={"train": split},
        )
        write_manifest(str(self.folder), manifest)
        for file in files:
            file.unlink()
