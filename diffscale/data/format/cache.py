"""Cache on the node's disk for shards of remote datasets: each fetched once, verified, bounded in size."""

from __future__ import annotations

import fcntl
import hashlib
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from diffscale.core import storage
from diffscale.core.cache import cache_dir, file_lock
from diffscale.core.text import one_line
from diffscale.data.format.errors import ShardError
from diffscale.data.format.manifest import Shard

ATTEMPTS = 5
CHUNK = 4 << 20


@dataclass(frozen=True)
class ShardCache:
    """A folder that the workers of a node share. A file becomes visible once it is complete and verified.

    folder: None is the user's cache folder
    gigabytes: upper bound on the files' total size; the least recently opened are removed first, even if in use,
        since the pages of a removed file stay readable through its memory map
    """

    folder: str | None = None
    gigabytes: float = 100.0

    @property
    def root(self) -> Path:
        return Path(self.folder) if self.folder else cache_dir() / "shards"

    def fetch(self, uri: str, shard: Shard) -> str:
        """Return the local path of a shard. Raises ShardError if the shard is missing or differs from the manifest."""
        target = self.root / f"{shard.sha256}.arrow"
        with file_lock(self.root / "locks" / shard.sha256):  # one worker fetches, the others wait for it
            if not self._is_good(target, shard):
                self._download(uri, shard, target)
            os.utime(self._used(target))
        return str(target)

    def _used(self, target: Path) -> Path:
        """Return the file whose time says when the shard was last opened; the shard's own time identifies it."""
        return self.root / "locks" / target.stem

    def _is_good(self, target: Path, shard: Shard) -> bool:
        return target.exists() and target.stat().st_size == shard.bytes

    def _download(self, uri: str, shard: Shard, target: Path) -> None:
        """Stream the shard to a temporary file and hash it; after a failure, retry with growing pauses."""
        # One temporary file for each shard: under the shard's lock a killed worker's file can be reused.
        temporary = target.with_suffix(".tmp")
        self._make_room(shard.bytes, temporary)
        problem = ""
        try:
            for attempt in range(ATTEMPTS):
                try:
                    found = self._copy(uri, temporary)
                except FileNotFoundError:
                    raise ShardError(uri, "it is missing") from None
                except OSError as error:
                    problem = f"it could not be read ({one_line(error, 160)})"
                else:
                    if found == shard.sha256:
                        os.replace(temporary, target)
                        return
                    problem = f"its SHA-256 is {found[:12]}... instead of {shard.sha256[:12]}..."
                if attempt + 1 < ATTEMPTS:
                    time.sleep(0.2 * 2**attempt)
            raise ShardError(uri, f"{problem}, {ATTEMPTS} times")
        finally:
            temporary.unlink(missing_ok=True)

    def _copy(self, uri: str, temporary: Path) -> str:
        fs, path = storage.filesystem(uri)
        digest = hashlib.sha256()
        with fs.open_input_stream(path) as source, open(temporary, "r+b") as sink:
            while data := source.read(CHUNK):
                digest.update(data)
                sink.write(data)
            sink.truncate()
            sink.flush()
            os.fsync(sink.fileno())  # a file of the right size counts as good, even after a power failure
        return digest.hexdigest()

    def _make_room(self, needed: int, temporary: Path) -> None:
        """Remove the least recently opened shards until `needed` bytes fit, and reserve them as `temporary`."""
        with file_lock(self.root / "locks" / "evict"):
            temporary.unlink(missing_ok=True)
            files = sorted(self.root.glob("*.arrow"), key=lambda f: self._used(f).stat().st_mtime)
            held = sum(map(_size, [*files, *self._being_fetched()]))
            while files and held + needed > self.gigabytes * 1e9:
                oldest = files.pop(0)
                held -= _size(oldest)
                oldest.unlink(missing_ok=True)
            with open(temporary, "wb") as file:
                file.truncate(needed)

    def _being_fetched(self) -> Iterator[Path]:
        """Yield the temporary files of living workers; remove those that a killed worker left."""
        for temporary in self.root.glob("*.tmp"):
            with open(self._used(temporary), "a") as file:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    yield temporary
                else:
                    temporary.unlink(missing_ok=True)


def _size(file: Path) -> int:
    try:
        return file.stat().st_size
    except FileNotFoundError:  # another worker has just renamed it
        return 0
