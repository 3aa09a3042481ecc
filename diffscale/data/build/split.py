"""Which images are held out: a function of the image's name, so that adding images never moves another one."""

from __future__ import annotations

import hashlib


def is_held_out(name: str, fraction: float, seed: int = 0) -> bool:
    """True for about `fraction` of all names."""
    digest = hashlib.sha256(f"{seed}/{name}".encode("utf-8", "surrogateescape")).digest()
    return int.from_bytes(digest[:8], "big") < fraction * 2**64
