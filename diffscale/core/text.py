"""Small pieces of text: the nearest of several names, an error on one line."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def nearest(value: str, choices: Iterable[str]) -> str:
    """Return "one of ...", with the nearest first where there is one."""
    names = sorted(choices)
    near = difflib.get_close_matches(value, names, n=1, cutoff=0.5)
    return (f"{near[0]} (the nearest), or " if near else "") + "one of: " + ", ".join(names)


def one_line(error: object, limit: int = 200) -> str:
    """Return a message without line breaks, cut at `limit` characters."""
    return " ".join(str(error).split())[:limit]
