"""A split of an Arrow dataset: gathers rows from memory-mapped pixels, or decodes encoded images in a few threads."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pyarrow import fs as pafs
from torch import Tensor

from diffscale.core import storage
from diffscale.core.errors import UserError
from diffscale.data.build import decode
from diffscale.data.format.cache import ShardCache
from diffscale.data.format.errors import ShardError
from diffscale.data.format.manifest import FILE, Encoding, Manifest, Split, SplitName, read_manifest
from diffscale.data.format.shard import MappedShard, check_size, open_shard
from diffscale.kernels import rows

NEAR = 1 << 30  # default bytes of rows in one window of the blocked order
FETCHES = 4  # shards fetched at once: one stream does not saturate the connection to an object store
STRETCHES = 4  # parts of a batch for each decoding thread
MOST_MAPPED = 16_384  # shards mapped at once: Linux allows a process 65,530 maps
MOST_GATHERING = 4  # threads that copy rows, each at least 1 MiB: more threads compete for the same memory


class Dataset:
    """A split of an Arrow dataset folder, local or remote. Rows are numbered 0 .. n-1.

    n: rows
    resolution: side of an image in pixels, or of a latent
    image_resolution: side in pixels of the images, also of those that latents stand for
    channels: channels of an image or latent
    num_classes: 0 for data without labels
    class_names: one name for each class
    content_hash: identity of the rows, 16 hex digits
    lossy: whether some source image was stored lossily
    dtype: uint8, float16 or float32
    mean, std: per channel, of pixels in [0, 255] or of latents
    heldout: the held-out split, or None
    block_rows: rows of a block of the blocked order, by default a shard
    window: blocks in a window of the blocked order, by default about 1 GiB; like `block_rows` it follows from the
        rows alone, so the order does not depend on where the files are
    """

    def __init__(self, path: str, manifest: Manifest, split: SplitName = "train", cache: ShardCache | None = None):
        self.path, self.manifest, self.split_name, self.cache = path, manifest, split, cache
        self.split: Split = manifest.splits[split]
        self.n, self.content_hash = self.split.rows, self.split.content_hash
        self.resolution, self.channels = manifest.resolution, manifest.channels
        self.class_names, self.num_classes = list(manifest.class_names), len(manifest.class_names)
        self.lossy, self.dtype = manifest.lossy, manifest.dtype
        self.mean, self.std = self.split.mean, self.split.std
        shards = self.split.shards
        self.starts = np.concatenate([[0], np.cumsum([s.rows for s in shards], dtype=np.int64)])
        self.block_rows = max((s.rows for s in shards), default=1)
        self.window = max(1, round(NEAR / max((s.bytes for s in shards), default=1)))
        self._mapped: list[MappedShard | None] = [None] * len(shards)
        self._last_used: OrderedDict[int, None] = OrderedDict()  # mapped shards, the least recently used first

    def __len__(self) -> int:
        return self.n

    @classmethod
    def open(cls, path: str, split: SplitName = "train", cache: ShardCache | None = None) -> Dataset:
        """Open a folder with a manifest.json; `open_dataset` (format/open.py) also takes other folders.

        Raises UserError for a folder that is no dataset or lacks the split, ShardError for a missing or short shard.
        """
        manifest = read_manifest(path)
        if split not in manifest.splits or not manifest.splits[split].rows:
            raise UserError(
                setting="split",
                value=split,
                expected=f"one of {sorted(manifest.splits)} in {path}",
                fix="build the dataset with --split 0.1 to hold out a tenth",
            )
        dataset = cls.of_manifest(path, manifest, split, cache)
        dataset.check_files()
        return dataset

    @classmethod
    def of_manifest(
        cls, path: str, manifest: Manifest, split: SplitName = "train", cache: ShardCache | None = None
    ) -> Dataset:
        """Return the dataset of a manifest that was read before, without looking at its files."""
        return cls(path, manifest, split, (cache or ShardCache()) if storage.is_remote(path) else None)

    def __reduce__(self):  # each worker opens the files again
        return Dataset.open, (self.path, self.split_name, self.cache)

    @cached_property
    def heldout(self) -> Dataset | None:
        """The images that training never sees, or None if the dataset was built without `--split`."""
        held = self.manifest.splits.get("heldout")
        if self.split_name == "heldout" or not held or not held.rows:
            return None
        return Dataset(self.path, self.manifest, "heldout", self.cache)

    @cached_property
    def class_counts(self) -> tuple[int, ...]:
        """The number of images of each class, empty for data without labels.

        Every label is read if an earlier version of diffscale has built the dataset."""
        if self.split.class_counts is not None:
            return tuple(self.split.class_counts)
        counts = np.zeros(self.num_classes, np.int64)
        for s in range(len(self.split.shards) if self.num_classes else 0):
            counts += np.bincount(self.shard(s).labels, minlength=self.num_classes)
        return tuple(counts.tolist())

    @property
    def is_latent(self) -> bool:
        return self.manifest.layout == "latents"

    @property
    def encoding(self) -> Encoding | None:
        """How an autoencoder made the latents; None for pixels, and for latents that came as arrays."""
        return self.manifest.encoding

    @property
    def image_resolution(self) -> int:
        return self.resolution if self.encoding is None else self.encoding.image_resolution

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Shape of one row: (H, W, C) for pixels; (C, H, W) for latents, of an encoding their means and deviations."""
        side = self.resolution
        return (self.manifest.stored_channels, side, side) if self.is_latent else (side, side, self.channels)

    def gather(self, indices: NDArray[np.int64], out: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return rows in the given order; a row may occur several times.

        indices: int64 (B,) in [0, n)
        out: contiguous tensor (B, *image_shape) of the dataset's dtype to fill; None makes a new one

        Returns contiguous images, uint8 (B, H, W, C) or floats (B, C, H, W) for latents, and labels int64 (B,), zeros
        for data without classes. Raises IndexError for a row outside the dataset, ShardError if a file has changed
        since it was opened or an image does not decode.
        """
        indices = np.asarray(indices, np.int64)
        if len(indices) and (indices.min() < 0 or indices.max() >= self.n):
            raise IndexError(f"rows are 0 to {self.n - 1}")
        if out is None:
            out = torch.empty((len(indices), *self.image_shape), dtype=getattr(torch, self.dtype))
        elif (
            out.shape != (len(indices), *self.image_shape)
            or str(out.dtype)[6:] != self.dtype
            or not out.is_contiguous()
        ):
            raise ValueError(f"out is {out.dtype} {tuple(out.shape)}: contiguous {self.dtype} of the rows' shape")
        labels = np.empty(len(indices), np.int64)
        which = np.searchsorted(self.starts, indices, side="right") - 1
        pieces = [0] if len(self.starts) == 2 else np.unique(which).tolist()
        self.fetch(pieces)
        self._check_unchanged(pieces)  # before: a truncated file must be an error, not a SIGBUS
        self._fill(indices, which, pieces, out.numpy(), labels)
        self._check_unchanged(pieces)  # after: no batch may hold pixels written during the copy
        return out, torch.from_numpy(labels)

    def _check_unchanged(self, pieces: list[int]) -> None:
        """Raise ShardError if the file of one of these shards was altered since it was opened."""
        for s in pieces:
            if (mapped := self._mapped[s]) is not None:
                mapped.check_unchanged()

    def _fill(
        self,
        indices: NDArray[np.int64],
        which: NDArray[np.int64],
        pieces: list[int],
        pixels: NDArray[Any],
        labels: NDArray[np.int64],
    ) -> None:
        """Copy the rows into `pixels` and `labels`.

        which: the shard of each index
        pieces: the distinct shards in `which`
        """
        if self.manifest.layout == "encoded":
            self._decode_into(indices, which, pixels, labels)
            return
        shards = {s: self.shard(s) for s in pieces}  # kept here: the cache may evict a shard during the copy
        local = indices - self.starts[which]
        begins = np.zeros((2, len(self.starts) - 1), np.int64)
        for s, shard in shards.items():
            begins[:, s] = shard.addresses
        for begin, target in zip(begins, (pixels, labels), strict=True):
            sources = begin[which] + local * (target.nbytes // max(1, len(target)))
            threads = max(1, min(self.threads, MOST_GATHERING, target.nbytes >> 20))
            if rows.gather_rows(sources, target, threads):
                continue
            for s, shard in shards.items():
                places = np.flatnonzero(which == s)
                target[places] = (shard.images if target is pixels else shard.labels)[local[places]]

    def _decode_into(
        self, indices: NDArray[np.int64], which: NDArray[np.int64], pixels: NDArray[Any], labels: NDArray[np.int64]
    ) -> None:
        def one(i: int) -> None:
            shard, local = self.shard(int(which[i])), int(indices[i] - self.starts[which[i]])
            try:
                decode.decode_exact(shard.images[local].as_buffer(), pixels[i])
            except decode.ImageError as error:
                raise ShardError(shard.path, f"its row {local} does not decode ({error})") from None
            labels[i] = shard.labels[local]

        self._in_threads(one, range(len(indices)))

    @cached_property
    def threads(self) -> int:
        """Number of threads that decode or gather: the cores this process may use, at most 16."""
        return max(1, min(16, len(os.sched_getaffinity(0))))

    def _in_threads(self, work: Callable[..., None], *arguments: Iterable[Any]) -> None:
        """Call `work` for each set of arguments, several calls per thread task: submitting one small image would cost
        a good part of decoding it."""
        calls = list(zip(*arguments, strict=True))
        size = len(calls) if self.threads == 1 else max(1, len(calls) // (STRETCHES * self.threads))

        def stretch(first: int) -> None:
            for values in calls[first : first + size]:
                work(*values)

        if size >= len(calls):
            stretch(0)
        else:
            list(self._pool.map(stretch, range(0, len(calls), size)))

    @cached_property
    def _pool(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(self.threads, thread_name_prefix="diffscale-decode")

    def name(self, row: int) -> str:
        """Return the source name of a row, for messages."""
        s = int(np.searchsorted(self.starts, row, side="right") - 1)
        return self.shard(s).names[row - int(self.starts[s])].as_py() or ""

    def shard(self, s: int) -> MappedShard:
        """Return the s-th shard, memory-mapped; a remote shard is fetched into the node's cache first."""
        mapped = self._mapped[s]
        if mapped is None:
            entry = self.split.shards[s]
            mapped = self._mapped[s] = open_shard(self.local_path(s), entry, self.manifest, self.cache is not None)
            if self.cache is not None:
                self._drop_evicted()
        self._last_used[s] = None
        self._last_used.move_to_end(s)
        while len(self._last_used) > MOST_MAPPED:
            self._mapped[self._last_used.popitem(last=False)[0]] = None
        return mapped

    def fetch(self, pieces: Sequence[int]) -> None:
        """Open these shards, several at once for a remote dataset. Raises ShardError."""
        missing = [s for s in pieces if self._mapped[s] is None]
        if self.cache is None or len(missing) < 2:
            for s in missing:
                self.shard(s)
            return
        with ThreadPoolExecutor(min(FETCHES, len(missing)), thread_name_prefix="diffscale-fetch") as pool:
            list(pool.map(self.shard, missing))

    def _drop_evicted(self) -> None:
        """Unmap shards that were evicted from the cache: a deleted file occupies disk space while it is mapped."""
        for s in list(self._last_used):
            mapped = self._mapped[s]
            if mapped is None or not os.path.exists(mapped.path):
                self._mapped[s] = None
                self._last_used.pop(s, None)

    def local_path(self, s: int) -> str:
        """Return the local file of the s-th shard; a remote shard is fetched first."""
        entry = self.split.shards[s]
        uri = storage.join(self.path, entry.file)
        if not storage.is_remote(self.path):
            return uri
        assert self.cache is not None
        return self.cache.fetch(uri, entry)

    def local_shards(self) -> list[tuple[str, str]]:
        """Return (path, expected SHA-256) of each shard whose checksum was not compared when it was fetched."""
        if self.cache is not None:
            return []
        return [(storage.join(self.path, shard.file), shard.sha256) for shard in self.split.shards]

    def check_files(self) -> None:
        """Raise ShardError naming the first shard that is missing or has the wrong size.

        Runs at every start, and on the driver after a worker died of SIGBUS."""
        if not storage.is_remote(self.path):
            for shard in self.split.shards:
                check_size(storage.join(self.path, shard.file), shard)
            return
        sizes = storage.file_sizes(self.path)
        for shard in self.split.shards:
            size = sizes.get(shard.file)
            if size is None:
                raise ShardError(storage.join(self.path, shard.file), "it is missing")
            if size != shard.bytes:
                problem = f"it has {size:,} bytes instead of {shard.bytes:,}"
                raise ShardError(storage.join(self.path, shard.file), problem)


def available_resolutions(folder: str) -> Sequence[int]:
    """Return the resolutions of a folder built at several: its subfolders that have a manifest."""
    fs, path = storage.filesystem(folder)
    names = [info.base_name for info in fs.get_file_info(pafs.FileSelector(path, allow_not_found=True))]
    return sorted(int(n) for n in names if n.isdigit() and storage.exists(storage.join(folder, n, FILE)))
