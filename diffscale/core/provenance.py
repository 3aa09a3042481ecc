"""The provenance of a result: source commit and versions of the libraries."""

from __future__ import annotations

import hashlib
import os
import platform
import subprocess
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

COMMIT, DIRTY = "DIFFSCALE_COMMIT", "DIFFSCALE_DIRTY"
LIBRARIES = ("diffscale", "torch", "torchvision", "ray", "timm", "torch-fidelity", "pyarrow", "numpy", "pillow")


class Source(NamedTuple):
    """The state of the source code."""

    commit: str
    dirty: bool


@cache
def source() -> Source:
    """Return the commit and whether files were changed since.

    They come from the environment if it has them: Ray leaves .git out of a job's upload, so the driver that submits the
    job sends both. Else they come from git; without git a hash of the package's files stands for the commit.
    """
    if commit := os.environ.get(COMMIT):
        return Source(commit, os.environ.get(DIRTY, "0") not in ("", "0", "false"))
    package = Path(__file__).parents[1]
    root = package.parent
    if (root / ".git").exists() and (commit := _git(root, "rev-parse", "HEAD")):
        return Source(commit, bool(_git(root, "status", "--porcelain", "--untracked-files=no")))
    digest = hashlib.sha256()
    for file in sorted(package.rglob("*.py")):
        digest.update(file.relative_to(package).as_posix().encode() + b"\0" + file.read_bytes())
    return Source(f"source-{digest.hexdigest()[:16]}", False)


def _git(root: Path, *arguments: str) -> str:
    try:
        run = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return run.stdout.strip() if run.returncode == 0 else ""


@cache
def versions() -> dict[str, str]:
    """Return the installed versions of Python and of the libraries that results depend on."""
    found = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def job_environment() -> dict[str, str]:
    """Return the environment variables that carry the source's state to processes without a .git folder."""
    commit, dirty = source()
    return {COMMIT: commit, DIRTY: str(int(dirty))}
