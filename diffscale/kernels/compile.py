"""Compiles the C++ kernels of this folder, once per machine, and loads them with ctypes.

DIFFSCALE_NATIVE_KERNELS=0 turns them off, and without a compiler there are none. Callers then use operations of torch
or numpy.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

import numpy as np
from torch import Tensor

from diffscale.core.cache import cache_dir
from diffscale.core.hashing import sha256_of

log = logging.getLogger(__name__)

_FLAGS = ("-O3", "-march=native", "-std=c++17", "-fno-math-errno", "-fno-trapping-math", "-fopenmp", "-shared", "-fPIC")


@functools.cache
def library(name: str) -> ctypes.CDLL | None:
    """Return the compiled `name`.cpp ("rows"), built on first use; None if that is impossible or turned off."""
    compiler = shutil.which("g++") or shutil.which("c++")
    if os.environ.get("DIFFSCALE_NATIVE_KERNELS") == "0" or compiler is None:
        return None
    try:
        return ctypes.CDLL(str(_build(Path(__file__).parent / f"{name}.cpp", compiler)))
    except (OSError, subprocess.SubprocessError) as error:
        log.warning("%s.cpp could not be compiled, slower operations are used instead: %s", name, error)
        return None


def available(name: str) -> bool:
    """Return whether a library can be compiled and runs on this processor (its function `available`, if it has one).

    The answer is kept: torch.compile can trace the second call, but not the look into a library.
    """
    if name not in _AVAILABLE:
        found = library(name)
        _AVAILABLE[name] = found is not None and bool(getattr(found, "available", lambda: True)())
    return _AVAILABLE[name]


_AVAILABLE: dict[str, bool] = {}


def pointers(*tensors: Tensor | None) -> list[ctypes.c_void_p]:
    """Return the data pointers of the tensors; a null pointer for None."""
    return [ctypes.c_void_p(None if tensor is None else tensor.data_ptr()) for tensor in tensors]


def addresses(*arrays: np.ndarray) -> list[ctypes.c_void_p]:
    """Return the data pointers of the arrays."""
    return [ctypes.c_void_p(array.ctypes.data) for array in arrays]


def integers(*numbers: int) -> list[ctypes.c_int64]:
    return [ctypes.c_int64(number) for number in numbers]


def _build(source: Path, compiler: str) -> Path:
    """Compile into the user's own cache, under a name that changes with source, flags, compiler and processor."""
    version = subprocess.run([compiler, "--version"], capture_output=True, check=True, timeout=30).stdout
    cpu = Path("/proc/cpuinfo")
    flags = (
        next((line for line in cpu.read_text().splitlines() if line.startswith("flags")), "") if cpu.exists() else ""
    )
    parts = (source.read_bytes(), " ".join(_FLAGS).encode(), version, flags.encode(), platform.machine().encode())
    key = sha256_of(b"\0".join(parts))[:16]
    folder = cache_dir()
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if folder.stat().st_uid != os.getuid() or not os.access(folder, os.W_OK):
            raise PermissionError(f"{folder} does not belong to this user")
    except OSError:
        folder = Path(tempfile.mkdtemp(prefix="diffscale-"))
    target = folder / f"{source.stem}-{key}.so"
    if not target.exists():
        descriptor, scratch = tempfile.mkstemp(dir=folder, suffix=".so")
        os.close(descriptor)
        subprocess.run([compiler, *_FLAGS, str(source), "-o", scratch], capture_output=True, check=True, timeout=120)
        os.replace(scratch, target)
    return target
