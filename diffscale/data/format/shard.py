"""One shard: an Arrow IPC file of one record batch, written once and read through a memory map."""

from __future__ import annotations

import hashlib
import io
import os
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from diffscale.core import storage
from diffscale.core.text import one_line
from diffscale.data.format.errors import ShardError
from diffscale.data.format.manifest import ContentHash, Manifest, Shard

Signature = tuple[int, int, int]


@dataclass(frozen=True)
class MappedShard:
    """A shard opened through a memory map. Its rows are views of the file.

    images: array view (rows, ...), or a BinaryArray of encoded images
    labels: int64 (rows,)
    names: source name of each row
    signature: state of the file when it was opened
    addresses: where the data of an array view and of the labels begin in memory
    is_cached: the file is in the node's cache, which may evict it while the map keeps its pages readable
    """

    path: str
    images: Any
    labels: NDArray[np.int64]
    names: pa.StringArray
    signature: Signature
    addresses: tuple[int, int]
    is_cached: bool = False

    def check_unchanged(self) -> None:
        """Raise ShardError if the file was altered, replaced or removed since it was opened."""
        if not (self.is_cached and not os.path.exists(self.path)):
            check_signature(self.path, self.signature)


def signature(path: str) -> Signature:
    """Return (inode, size, mtime in ns), which changes whenever the file is written or replaced."""
    status = os.stat(path)
    return status.st_ino, status.st_size, status.st_mtime_ns


def check_signature(path: str, opened: Signature) -> None:
    """Raise ShardError if the file was altered, replaced or removed since it had the signature `opened`."""
    try:
        now = signature(path)
    except FileNotFoundError:
        raise ShardError(path, "it was removed while in use") from None
    if now != opened:
        what = "truncated" if now[0] == opened[0] and now[1] < opened[1] else "altered or replaced"
        raise ShardError(path, f"it was {what} while in use")


def open_shard(path: str, shard: Shard, manifest: Manifest, is_cached: bool = False) -> MappedShard:
    """Map a local file. Raises ShardError unless its size, columns, shape and rows are those of the manifest."""
    check_size(path, shard)
    before = signature(path)
    try:
        reader = pa.ipc.open_file(pa.memory_map(path))
        if reader.num_record_batches != 1:
            raise ValueError(f"it has {reader.num_record_batches} record batches instead of 1")
        batch = reader.get_batch(0)
        types = [batch.schema.field(name).type for name in ("label", "name") if name in batch.schema.names]
        if batch.schema.names != ["image", "label", "name"] or types != [pa.int64(), pa.string()]:
            raise ValueError(f"its columns are {batch.schema}")
        if batch.num_rows != shard.rows:
            raise ValueError(f"it has {batch.num_rows} rows, the manifest says {shard.rows}")
        expected = image_type(manifest)
        if batch.schema.field("image").type != expected:
            raise ValueError(f"its images are {batch.schema.field('image').type}, the manifest says {expected}")
        batch.validate()
        if any(column.null_count for column in batch.columns):
            raise ValueError("it has missing values")
        for column in batch.columns:  # Arrow trusts the offsets in a file: a wrong one would crash the process
            if not isinstance(column, pa.ExtensionArray):
                column.validate(full=True)
        column = batch.column("image")
        images = column if manifest.layout == "encoded" else column.to_numpy_ndarray()
        labels = batch.column("label").to_numpy()
        if not 0 <= labels.min() <= labels.max() < max(1, len(manifest.class_names)):
            raise ValueError(f"it has labels outside of its {len(manifest.class_names)} classes")
    except (pa.ArrowException, ValueError, OSError, TypeError, AttributeError, KeyError) as error:  # Ray's types too
        raise ShardError(path, f"it cannot be read ({one_line(error) or type(error).__name__})") from None
    addresses = (0, 0) if manifest.layout == "encoded" else (images.ctypes.data, labels.ctypes.data)
    return MappedShard(path, images, labels, batch.column("name"), before, addresses, is_cached)


def check_size(path: str, shard: Shard) -> None:
    """Raise ShardError for a missing, truncated or longer file: cheap enough for every shard at every start."""
    try:
        size = os.stat(path).st_size
    except OSError:
        raise ShardError(path, "it is missing") from None
    if size != shard.bytes:
        raise ShardError(path, f"it has {size:,} bytes instead of {shard.bytes:,}")


def image_type(manifest: Manifest) -> pa.DataType:
    """Return the Arrow type of the `image` column."""
    side, channels = manifest.resolution, manifest.stored_channels
    if manifest.layout == "encoded":
        return pa.large_binary()
    shape = [channels, side, side] if manifest.layout == "latents" else [side, side, channels]
    return pa.fixed_shape_tensor(pa.type_for_alias(manifest.dtype), shape)


def make_batch(
    images: NDArray[Any] | list[bytes], labels: NDArray[np.int64] | list[int], names: list[str]
) -> pa.RecordBatch:
    """Return the rows of one shard. images: (rows, H, W, C) uint8, (rows, C, H, W) floats, or encoded files."""
    if isinstance(images, list):
        column = pa.array(images, pa.large_binary())
    else:
        column = pa.FixedShapeTensorArray.from_numpy_ndarray(np.ascontiguousarray(images))
    arrays = [column, pa.array(labels, pa.int64()), pa.array(names, pa.string())]
    return pa.RecordBatch.from_arrays(arrays, names=["image", "label", "name"])


def write_shard(folder: str, file: str, batch: pa.RecordBatch) -> Shard:
    """Write the rows as one file, atomically; return its manifest entry."""
    content = ContentHash()
    column, labels = batch.column("image"), batch.column("label").to_numpy()
    if pa.types.is_large_binary(column.type):
        for image, label in zip(column, labels, strict=True):
            content.add(memoryview(image.as_buffer()), label)
    else:
        for image, label in zip(column.to_numpy_ndarray(), labels, strict=True):
            content.add(image, label)
    sink = io.BytesIO()
    with pa.ipc.new_file(sink, batch.schema) as writer:
        writer.write_batch(batch)
    data = sink.getbuffer()
    storage.write_bytes(storage.join(folder, file), data)  # type: ignore[arg-type]
    digest = hashlib.sha256(data).hexdigest()
    return Shard(file=file, rows=batch.num_rows, bytes=len(data), sha256=digest, content=content.hex())
