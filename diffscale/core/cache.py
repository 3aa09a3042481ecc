"""The user's cache folder, and locks among the processes of one machine."""

from __future__ import annotations

import fcntl
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from diffscale.core.errors import UserError

log = logging.getLogger(__name__)
ENVIRONMENT = "DIFFSCALE_CACHE"


def home_dir() -> Path:
    """Return the user's home folder. Raises UserError if nothing says where it is."""
    try:
        return Path.home()
    except RuntimeError as error:
        raise UserError(setting="HOME", value=None, expected="the user's home folder", reason=str(error)) from None


def cache_dir() -> Path:
    """Return `$DIFFSCALE_CACHE`, else `$XDG_CACHE_HOME/diffscale`, else `~/.cache/diffscale`. It may not exist yet."""
    if own := os.environ.get(ENVIRONMENT):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or home_dir() / ".cache") / "diffscale"


@contextmanager
def file_lock(path: Path, work: str = "") -> Iterator[None]:
    """Hold an advisory lock on a file, which is created with its folders. A lock is released if its process dies.

    work: what another process may be doing; if this one has to wait for it, the log says so.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if work:
                log.warning("waiting for another process: %s", work)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
