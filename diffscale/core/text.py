"""Small pieces of text: the nearest of several names, a size, an error on one line, a generated part of a document."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from pathlib import Path

from diffscale.core.errors import UserError


def nearest(value: str, choices: Iterable[str]) -> str:
    """Return "one of ...", with the nearest first where there is one."""
    names = sorted(choices)
    near = difflib.get_close_matches(value, names, n=1, cutoff=0.5)
    return (f"{near[0]} (the nearest), or " if near else "") + "one of: " + ", ".join(names)


def gigabytes(size: float) -> str:
    """Return a number of bytes as text."""
    return f"{size / 1e9:.1f} GB"


def one_line(error: object, limit: int = 200) -> str:
    """Return a message without line breaks, cut at `limit` characters; an empty error is named by its type."""
    text = " ".join(str(error).split())[:limit]
    return text or (type(error).__name__ if isinstance(error, BaseException) else "")


def first_line(error: object, limit: int = 200) -> str:
    """Return the first line of a message, cut at `limit` characters; an empty error is named by its type."""
    lines = str(error).splitlines()
    return lines[0][:limit] if lines else one_line(error, limit)


def with_generated(text: str, name: str, body: str) -> str:
    """Return the text with everything between `<!-- name:begin -->` and `<!-- name:end -->` replaced by `body`.

    Raises ValueError unless each marker is there once, in this order.
    """
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise ValueError(f"expected {begin} and, after it, {end}, once each")
    head, tail = text[: text.index(begin) + len(begin)], text[text.index(end) :]
    return f"{head}\n{body}\n{tail}"


def write_generated(file: Path, name: str, body: str) -> None:
    """Replace the generated part `name` of a document. Raises UserError if the file or its markers are missing."""
    try:
        file.write_text(with_generated(file.read_text(encoding="utf-8"), name, body), encoding="utf-8")
    except (OSError, ValueError) as error:
        raise UserError(
            setting="--write",
            value=str(file),
            expected="a document with the markers of the generated part",
            reason=one_line(error),
        ) from None
