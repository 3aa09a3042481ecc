"""One cache folder for everything, and locks that end with their process."""

from __future__ import annotations

import multiprocessing
import time
from pathlib import Path

import pytest

from diffscale.core.cache import cache_dir, file_lock
from diffscale.data import ShardCache
from diffscale.evaluation.networks import weights


def test_folder_by_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("DIFFSCALE_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_dir() == tmp_path / ".cache" / "diffscale"
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert cache_dir() == Path("/x/diffscale")
    monkeypatch.setenv("DIFFSCALE_CACHE", "/y")
    assert cache_dir() == Path("/y")
    assert ShardCache().root == Path("/y/shards")
    assert weights.cache_dir is cache_dir


def _hold(path: Path, started: object, seconds: float) -> None:
    with file_lock(path):
        started.set()  # type: ignore[attr-defined]
        time.sleep(seconds)


def test_a_lock_waits_for_its_holder_and_not_for_a_killed_one(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "lock"
    for seconds, kill in ((0.5, False), (60.0, True)):
        started = multiprocessing.Event()
        holder = multiprocessing.Process(target=_hold, args=(path, started, seconds))
        holder.start()
        started.wait()
        if kill:
            holder.kill()
        with file_lock(path):
            pass
        holder.join(5)
        assert holder.exitcode == (-9 if kill else 0)
