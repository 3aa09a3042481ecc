"""Dataset folders made by hand, with true hashes around any content."""

from __future__ import annotations

import hashlib
import io
from pathlib import Path

import numpy as np
import pyarrow as pa

from diffscale.data.format.manifest import Manifest, Shard, Split, rows_hash, write_manifest
from diffscale.data.format.open import open_dataset
from diffscale.data.format.shard import make_batch

SIDE, ROWS = 4, 3


def make_dataset(folder: Path, shard: Shard, layout: str = "pixels") -> str:
    """A manifest around one shard, with every hash as it should be: a stranger computes them too."""
    content = rows_hash("uint8", SIDE, 3, [shard])
    split = Split(rows=shard.rows, content_hash=content, mean=[0.0] * 3, std=[1.0] * 3, shards=[shard])
    manifest = Manifest(
        layout=layout,
        dtype="uint8",
        resolution=SIDE,
        channels=3,
        class_names=[],
        content_hash=content,
        lossy=False,
        resize={},
        source={},
        made_with={},
        splits={"train": split},
    )
    write_manifest(str(folder), manifest)
    return str(folder)


def pixels_batch() -> pa.RecordBatch:
    images = np.arange(ROWS * SIDE * SIDE * 3, dtype=np.uint8).reshape(ROWS, SIDE, SIDE, 3)
    return make_batch(images, [0] * ROWS, ["a", "b", "c"])


def crafted(folder: Path, data: bytes) -> Shard:
    """The bytes as the folder's only shard, with a true checksum."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "train-00000.arrow").write_bytes(data)
    digest = hashlib.sha256(data).hexdigest()
    return Shard(file="train-00000.arrow", rows=ROWS, bytes=len(data), sha256=digest, content=digest)


def arrow_file(batch: pa.RecordBatch) -> bytes:
    sink = io.BytesIO()
    with pa.ipc.new_file(sink, batch.schema) as writer:
        writer.write_batch(batch)
    return sink.getvalue()


def read_everything(path: str) -> None:
    dataset = open_dataset(path)
    dataset.gather(np.arange(dataset.n))
    for row in range(dataset.n):
        dataset.name(row)
