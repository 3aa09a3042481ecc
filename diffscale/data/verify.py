"""`python -m diffscale.data verify`: every checksum, every row, every image."""

from __future__ import annotations

import os
from collections.abc import Iterator

import numpy as np

from diffscale.core import storage
from diffscale.data.format.cache import ShardCache
from diffscale.data.format.dataset import Dataset, available_resolutions
from diffscale.data.format.errors import ShardError
from diffscale.data.format.manifest import FILE, ContentHash, SplitName, read_manifest
from diffscale.data.format.shard import check_size, file_sha256, open_shard


def verify(folder: str) -> list[str]:
    """Everything that is wrong with the dataset (all resolutions of it), each naming its shard; empty when all is well.

    Raises UserError for a folder that is no dataset or whose manifest cannot be read.
    """
    several = [] if storage.exists(storage.join(folder, FILE)) else available_resolutions(folder)
    if several:
        return [problem for side in several for problem in verify(storage.join(folder, str(side)))]
    manifest = read_manifest(folder)
    problems: list[str] = []
    for split in manifest.splits:
        problems += _verify_split(folder, split)
    known = {FILE, "rejected.csv"} | {s.file for split in manifest.splits.values() for s in split.shards}
    extra = {uri.split("/")[-1] for uri in storage.list_files(folder, ".arrow")} - known
    return problems + [f"{storage.join(folder, name)}: not in the manifest" for name in sorted(extra)]


def _verify_split(folder: str, split: SplitName) -> Iterator[str]:
    manifest = read_manifest(folder)
    dataset = Dataset(folder, manifest, split, ShardCache() if storage.is_remote(folder) else None)
    for s, entry in enumerate(dataset.split.shards):
        try:
            path = dataset.local_path(s)
            check_size(path, entry)
            found = file_sha256(path)
            if found != entry.sha256:
                raise ShardError(path, f"its SHA-256 is {found[:12]}... instead of {entry.sha256[:12]}...")
            shard = open_shard(path, entry, manifest)
            start, content = int(dataset.starts[s]), ContentHash()
            encoded = manifest.layout == "encoded"
            for row in range(entry.rows):
                image = shard.images[row]
                content.add(
                    memoryview(image.as_buffer()) if encoded else np.ascontiguousarray(image), shard.labels[row]
                )
            if content.hex() != entry.content:
                raise ShardError(path, "its rows do not have the content hash of the manifest")
            if encoded:
                for first in range(start, start + entry.rows, 256):
                    dataset.gather(np.arange(first, min(first + 256, start + entry.rows)))
        except ShardError as error:
            yield f"{error.shard}: {error.problem}"
        except OSError as error:
            yield f"{os.fspath(dataset.path)}/{entry.file}: {error}"
