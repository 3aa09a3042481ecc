"""Checksums of every shard, compared in the background once per node."""

from __future__ import annotations

import hashlib
import json
import threading
from contextlib import suppress

from diffscale.data.format.cache import cache_root, locked
from diffscale.data.format.dataset import Dataset
from diffscale.data.format.errors import ShardError
from diffscale.data.format.shard import file_sha256, signature


class Verification:
    """Reads every shard of a local dataset once and compares its SHA-256 with the manifest.

    A result is remembered for the file as it is (path, inode, size, time), so other workers on the node, later runs and
    restarts do not read it again. Shards of a remote dataset were compared when they were fetched.

    damage: None, or (ShardError, range of its rows) of the first shard that differs.
    """

    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset
        self.damage: tuple[ShardError, range | None] | None = None
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="diffscale-verify", daemon=True)
            self._thread.start()

    def wait(self) -> None:
        self.start()
        assert self._thread is not None
        self._thread.join()

    def _run(self) -> None:
        for s, (path, sha256) in enumerate(self.dataset.local_shards()):
            rows = range(int(self.dataset.starts[s]), int(self.dataset.starts[s + 1]))
            try:
                check_sha256(path, sha256)
            except ShardError as error:
                self.damage = (error, rows)
                return


def check_sha256(path: str, expected: str) -> None:
    """Raises ShardError when the file's SHA-256 is another one. An unchanged file is read once per node."""
    try:
        before = signature(path)
    except OSError:
        raise ShardError(path, "it is missing") from None
    state = json.dumps([path, *before, expected])
    record = cache_root() / "verified" / hashlib.sha256(path.encode()).hexdigest()[:32]
    try:
        with locked(record.with_suffix(".lock")):
            with suppress(OSError):
                if record.read_text() == state:
                    return
            _compare(path, expected)
            if signature(path) == before:
                record.write_text(state)
    except ShardError:
        raise
    except OSError:  # no place to remember it: read it again next time
        _compare(path, expected)


def _compare(path: str, expected: str) -> None:
    found = file_sha256(path)
    if found != expected:
        raise ShardError(path, f"its SHA-256 is {found[:12]}... instead of {expected[:12]}...")
