"""Memory of large tensors on the CPU: kept by the process for the next one of that size."""

from __future__ import annotations

import ctypes
import functools
import sys

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of mallopt(3)
KEPT = 1 << 30  # bytes


@functools.cache
def keep_freed_memory() -> bool:
    """For processes that compute on the CPU: whether the C library was told so (glibc alone can be).

    By default glibc hands large blocks back to the system when they are freed and asks for them again a moment later;
    the kernel then clears them page by page: some 17,000 page faults in a training step of unet-small.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is None:
        return False
    return bool(mallopt(M_MMAP_THRESHOLD, KEPT)) and bool(mallopt(M_TRIM_THRESHOLD, KEPT))
