"""Hashes: SHA-256 of files and bytes, identities of JSON values, and the 64-bit mixing of splitmix64."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import NamedTuple

from diffscale.core import storage

CHUNK = 1 << 24
"""Bytes that are read at a time from a file that may be remote."""

MASK = 2**64 - 1
GOLDEN = 0x9E3779B97F4A7C15
"""2^64 / golden ratio: the increment of splitmix64."""


class Digest(NamedTuple):
    """The SHA-256 of a file, in hexadecimal, and the number of its bytes."""

    sha256: str
    bytes: int


def sha256_of(data: bytes | str) -> str:
    """Return the SHA-256 of bytes, or of a text in UTF-8, as 64 hexadecimal digits."""
    return hashlib.sha256(data.encode() if isinstance(data, str) else data).hexdigest()


def file_sha256(path: str | Path) -> str:
    """Return the SHA-256 of a local file as 64 hexadecimal digits. Raises FileNotFoundError."""
    with open(path, "rb", buffering=0) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest_of(uri: str) -> Digest:
    """Return the SHA-256 and the size of a file that may be in an object store. Raises FileNotFoundError."""
    fs, path = storage.filesystem(uri)
    digest, count = hashlib.sha256(), 0
    with fs.open_input_stream(path) as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
            count += len(chunk)
    return Digest(digest.hexdigest(), count)


def identify(**parts: object) -> str:
    """Return a 16-digit hash of named JSON values, the same on every machine."""
    text = json.dumps(parts, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return sha256_of(text)[:16]


def splitmix64(z: int) -> int:
    """Return the finaliser of splitmix64 (Steele, Lea, Flood 2014) of a 64-bit integer: a bijection that mixes."""
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & MASK
    z = (z ^ z >> 27) * 0x94D049BB133111EB & MASK
    return z ^ z >> 31
