"""Hashes that identities, checkpoints and the training order depend on: their values must never change."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from diffscale.core.hashing import GOLDEN, MASK, Digest, digest_of, file_sha256, identify, sha256_of, splitmix64


def test_sha256_of_files_and_bytes(tmp_path: Path) -> None:
    data = bytes(range(256)) * 100
    (tmp_path / "a").write_bytes(data)
    expected = hashlib.sha256(data).hexdigest()
    assert sha256_of(data) == expected
    assert file_sha256(tmp_path / "a") == expected
    assert digest_of(str(tmp_path / "a")) == Digest(expected, len(data))
    assert sha256_of("abc") == sha256_of(b"abc")
    with pytest.raises(FileNotFoundError):
        digest_of(str(tmp_path / "b"))


def test_identities_are_pinned() -> None:
    assert identify(a=1, b=[1.5, "x"], c=None) == identify(c=None, b=[1.5, "x"], a=1) == "fc829ae825088cb1"
    with pytest.raises(ValueError, match="JSON"):
        identify(a=float("nan"))


def test_splitmix64_gives_the_published_numbers() -> None:
    """The first outputs for seed 1234567 of Vigna's splitmix64.c."""
    state, out = 1234567, []
    for _ in range(3):
        state = state + GOLDEN & MASK
        out.append(splitmix64(state))
    assert out == [6457827717110365317, 3203168211198807973, 9817491932198370423]
