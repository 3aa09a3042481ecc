"""Checksums of a dataset's shards: compared in the background while training, or exhaustively on request."""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import suppress

import numpy as np

from diffscale.core import storage
from diffscale.core.cache import cache_dir, file_lock
from diffscale.core.hashing import file_sha256
from diffscale.core.progress import Work, working
from diffscale.data.format.cache import ShardCache
from diffscale.data.format.dataset import Dataset, available_resolutions
from diffscale.data.format.errors import ShardError
from diffscale.data.format.manifest import FILE, ContentHash, SplitName, read_manifest
from diffscale.data.format.shard import check_size, open_shard, signature

DECODED_TOGETHER = 256  # encoded images that `verify_dataset` decodes at once


class BackgroundCheck:
    """Compares the SHA-256 of shards of a local dataset with the manifest, in a thread, as they are first used.

    A result is remembered for the file's path, inode, size and time, so other workers of the node and later runs do
    not read the file again. Shards of a remote dataset were compared when they were fetched.

    damage: None, or (ShardError, range of the shard's rows) for the first shard found to differ
    """

    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset
        self.damage: tuple[ShardError, range] | None = None
        self._files = dataset.local_shards()
        self._noted: set[int] = set()
        self._left: deque[int] = deque()
        self._running = False
        self._changed = threading.Condition()

    def use(self, shards: Iterable[int]) -> None:
        """Compare these shards in the background unless they were given before."""
        new = [s for s in shards if s not in self._noted] if self._files else []
        if not new:
            return
        with self._changed:
            self._noted.update(new)
            self._left.extend(new)
            if not self._running:
                self._running = True
                threading.Thread(target=self._run, name="diffscale-verify", daemon=True).start()

    def wait(self, everything: bool = False) -> None:
        """Block until the shards that were used, or all shards, are compared."""
        if everything:
            self.use(range(len(self._files)))
        with self._changed:
            self._changed.wait_for(lambda: not self._running)

    def _run(self) -> None:
        while True:
            with self._changed:
                if not self._left or self.damage is not None:
                    self._running = False
                    self._changed.notify_all()
                    return
                s = self._left.popleft()
            rows = range(int(self.dataset.starts[s]), int(self.dataset.starts[s + 1]))
            try:
                check_sha256_once(*self._files[s])
            except ShardError as error:
                self.damage = (error, rows)
            except BaseException:
                with self._changed:
                    self._running = False
                    self._changed.notify_all()
                raise


def check_sha256_once(path: str, expected: str) -> None:
    """Raise ShardError if the file's SHA-256 differs. An unchanged file is read once per node."""
    try:
        before = signature(path)
    except OSError:
        raise ShardError(path, "it is missing") from None
    state = json.dumps([path, *before, expected])
    record = cache_dir() / "verified" / hashlib.sha256(path.encode()).hexdigest()[:32]
    try:
        with file_lock(record.with_suffix(".lock")):
            with suppress(OSError):
                if record.read_text() == state:
                    return
            check_sha256(path, expected)
            if signature(path) == before:
                record.write_text(state)
    except ShardError:
        raise
    except OSError:  # the cache is not writable: read the file again next time
        check_sha256(path, expected)


def check_sha256(path: str, expected: str) -> None:
    """Raise ShardError if the file's SHA-256 differs."""
    found = file_sha256(path)
    if found != expected:
        raise ShardError(path, f"its SHA-256 is {found[:12]}... instead of {expected[:12]}...")


def verify_dataset(folder: str) -> list[str]:
    """Check every checksum, row hash and image of a dataset, at all its resolutions; return one line per problem.

    Raises UserError for a folder that is no dataset or whose manifest cannot be read.
    """
    several = [] if storage.exists(storage.join(folder, FILE)) else available_resolutions(folder)
    if several:
        return [problem for side in several for problem in verify_dataset(storage.join(folder, str(side)))]
    manifest = read_manifest(folder)
    problems: list[str] = []
    with working(f"verifying {folder}", sum(split.rows for split in manifest.splits.values())) as work:
        for name in manifest.splits:
            problems += _verify_split(folder, name, work)
    known = {FILE, "rejected.csv"} | {s.file for split in manifest.splits.values() for s in split.shards}
    extra = {uri.split("/")[-1] for uri in storage.list_files(folder, ".arrow")} - known
    return problems + [f"{storage.join(folder, name)}: not in the manifest" for name in sorted(extra)]


def _verify_split(folder: str, split: SplitName, work: Work) -> Iterator[str]:
    manifest = read_manifest(folder)
    dataset = Dataset(folder, manifest, split, ShardCache() if storage.is_remote(folder) else None)
    counts = np.zeros(dataset.num_classes, np.int64)
    for s, entry in enumerate(dataset.split.shards):
        try:
            path = dataset.local_path(s)
            check_size(path, entry)
            check_sha256(path, entry.sha256)
            shard = open_shard(path, entry, manifest)
            start, content = int(dataset.starts[s]), ContentHash()
            counts += np.bincount(shard.labels, minlength=len(counts))[: len(counts)]
            encoded = manifest.layout == "encoded"
            for row in range(entry.rows):
                image = shard.images[row]
                content.add(
                    memoryview(image.as_buffer()) if encoded else np.ascontiguousarray(image), shard.labels[row]
                )
                work.advance(0 if encoded else 1)
            if content.hex() != entry.content:
                raise ShardError(path, "its rows do not have the content hash of the manifest")
            if encoded:
                for first in range(start, start + entry.rows, DECODED_TOGETHER):
                    rows = np.arange(first, min(first + DECODED_TOGETHER, start + entry.rows))
                    dataset.gather(rows)
                    work.advance(len(rows))
        except ShardError as error:
            yield f"{error.shard}: {error.problem}"
        except OSError as error:
            yield f"{os.fspath(dataset.path)}/{entry.file}: {error}"
    if dataset.split.class_counts not in (None, counts.tolist()):
        yield f"{storage.join(folder, FILE)}: splits.{split}.class_counts differs from the labels"
