"""Places that a command writes to: whether they can be written, and what is wrong with those that cannot."""

from __future__ import annotations

import errno
import os
import tempfile
import uuid
from pathlib import Path

from diffscale.core import cache, storage
from diffscale.core.errors import UserError

PERMANENT = frozenset(
    getattr(errno, name)
    for name in (
        "EACCES",
        "EPERM",
        "EROFS",
        "ENOTDIR",
        "EISDIR",
        "EEXIST",
        "ENAMETOOLONG",
        "ELOOP",
        "ENOSPC",
        "EDQUOT",
        "EFBIG",
    )
)
"""Errors of the operating system that a second attempt meets again: the place itself is wrong, or full."""


def require_writable(uri: str, setting: str) -> None:
    """Write a small file and delete it. Raises UserError with the reason if that is impossible.

    A folder that does not exist yet is not made: its nearest existing parent is tried.

    uri: absolute path or URI of a folder
    setting: what the user set it with
    """
    place = uri if storage.is_remote(uri) else _existing(Path(uri))
    if not storage.is_remote(place) and not os.path.isdir(place):
        raise _not_writable(uri, setting, f"{place} is a file")
    probe = storage.join(place, f".diffscale-{uuid.uuid4().hex}")
    try:
        storage.write_bytes(probe, b"diffscale")
        storage.delete(probe)
    except OSError as error:
        raise storage.unreachable(error) or _not_writable(uri, setting, error.strerror or str(error)) from None


def require_working_places() -> None:
    """Raise UserError unless the user's cache and a folder for temporary files can be written."""
    folder = cache.cache_dir()
    require_writable(str(folder), cache_setting())
    try:
        with tempfile.TemporaryFile():
            pass
    except OSError as error:
        raise _not_writable(os.environ.get("TMPDIR", "/tmp"), "TMPDIR", str(error)) from None


def cache_setting() -> str:
    """Return the environment variable that places the user's cache."""
    return next((name for name in (cache.ENVIRONMENT, "XDG_CACHE_HOME") if os.environ.get(name)), "HOME")


def explain(error: OSError) -> UserError | None:
    """Return an error about a place on one screen: an unreachable store, no permission, a file that is no folder.

    None for any other error, which may be a fault of the program.
    """
    if (explained := storage.unreachable(error)) is not None:
        return explained
    if error.errno not in PERMANENT:
        return None
    place = "" if error.filename is None else os.fsdecode(error.filename)
    return _not_writable(place, _setting_of(place), error.strerror or str(error))


def _setting_of(place: str) -> str:
    """Return what the user sets a place with, as far as the place tells."""
    if Path(place).is_relative_to(cache.cache_dir()):
        return cache_setting()
    return "HOME" if Path(place).is_relative_to(cache.home_dir()) else "PLACE"


def _existing(folder: Path) -> str:
    """Return the folder, or the nearest of its parents that exists."""
    while not os.path.lexists(folder) and folder != folder.parent:
        folder = folder.parent
    return str(folder)


def _not_writable(place: str, setting: str, reason: str) -> UserError:
    return UserError(setting=setting, value=place, expected="a folder that can be written", reason=reason)
