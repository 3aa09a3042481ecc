"""Data kernels: rows of an epoch's order, rows gathered into a batch, pixels without their fourth byte.

Each returns False where there is no compiled kernel (kernels/compile.py); the caller then uses numpy.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diffscale.kernels.compile import addresses, integers, library

KERNEL = "rows"


def permute(places: NDArray[np.int64], n: int, a: int, b: int, keys: Sequence[int]) -> bool:
    """Replace each place of an epoch by its row, in place: the permutation of data/loading/order.py.

    places: contiguous int64, each in [0, n)
    n: rows of the dataset, at least 2
    a, b: sides of the Feistel network, a * b >= n
    keys: one of each round
    """
    kernel = library(KERNEL)
    if kernel is None:
        return False
    of_rounds = np.array(keys, np.uint64)
    kernel.permute(
        *addresses(places), *integers(places.size, n, a, b), *addresses(of_rounds), *integers(len(of_rounds))
    )
    return True


def gather_rows(sources: NDArray[np.int64], target: NDArray[Any], threads: int) -> bool:
    """Copy rows from anywhere in memory into one array.

    sources: address of each row, int64 (B,)
    target: contiguous (B, ...), filled
    threads: number of threads that copy
    """
    kernel = library(KERNEL)
    if kernel is None:
        return False
    size = target.nbytes // max(1, len(target))
    kernel.gather_rows(*addresses(sources, target), *integers(len(target), size), ctypes.c_int(threads))
    return True


def drop_fourth(block: int, out: NDArray[np.uint8]) -> bool:
    """Copy the first three of every four bytes.

    block: address of the pixels, four bytes each
    out: contiguous uint8 (..., 3), filled
    """
    kernel = library(KERNEL)
    if kernel is None:
        return False
    kernel.drop_fourth(ctypes.c_void_p(block), *addresses(out), *integers(out.size // 3))
    return True
