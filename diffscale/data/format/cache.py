"""Shards of a remote dataset on the node's own disk: fetched once, checked, bounded in size."""

from __future__ import annotations

import fcntl
import hashlib
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from diffscale.core import storage
from diffscale.data.format.errors import ShardError
from diffscale.data.format.manifest import Shard

ENVIRONMENT = "DIFFSCALE_CACHE"
ATTEMPTS = 5
CHUNK = 4 << 20


def cache_root() -> Path:
    """`$DIFFSCALE_CACHE`, else `~/.cache/diffscale`."""
    return Path(os.environ.get(ENVIRONMENT) or Path.home() / ".cache" / "diffscale")


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Holds an advisory lock that other processes of this node respect; freed also when the process dies."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@dataclass(frozen=True)
class ShardCache:
    """A folder that several workers of a node share. A file is visible only when whole and verified.

    folder: None is the user's cache. gigabytes: the most that the files may hold; the least recently opened go first.
    A file in use may go too: its pages stay readable through the memory map that holds it.
    """

    folder: str | None = None
    gigabytes: float = 100.0

    @property
    def root(self) -> Path:
        return Path(self.folder) if self.folder else cache_root() / "shards"

    def fetch(self, uri: str, shard: Shard) -> str:
        """The local path of the shard. Raises ShardError when it is missing or differs from the manifest."""
        target = self.root / f"{shard.sha256}.arrow"
        with locked(self.root / "locks" / shard.sha256):  # one worker fetches, the others wait for it
            if not self._is_good(target, shard):
                self._download(uri, shard, target)
            os.utime(self._used(target))
        return str(target)

    def _used(self, target: Path) -> Path:
        """The file whose time says when the shard was last opened; that of the shard itself is its identity."""
        return self.root / "locks" / target.stem

    def _is_good(self, target: Path, shard: Shard) -> bool:
        return target.exists() and target.stat().st_size == shard.bytes

    def _download(self, uri: str, shard: Shard, target: Path) -> None:
        """Streams to a temporary file, hashing; tries again after a failure, with growing pauses."""
        temporary = target.with_suffix(
            ".tmp"
        )  # of this shard alone, whose lock is held: a killed worker's is taken over
        self._make_room(shard.bytes, temporary)
        problem = ""
        try:
            for attempt in range(ATTEMPTS):
                try:
                    found = self._copy(uri, temporary)
                except FileNotFoundError:
                    raise ShardError(uri, "it is missing") from None
                except OSError as error:
                    problem = f"it could not be read ({str(error).splitlines()[0][:160]})"
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
            os.fsync(sink.fileno())  # a file of the right size is taken for a good one, also after a power failure
        return digest.hexdigest()

    def _make_room(self, needed: int, temporary: Path) -> None:
        """Removes the least recently opened shards until `needed` bytes fit, and reserves them under that name."""
        with locked(self.root / "locks" / "evict"):
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
        """Temporary files of living workers; those that a killed one left are removed."""
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
