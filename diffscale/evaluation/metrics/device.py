"""Chooses where products and eigenvalues behind the distances are computed: a GPU that this process sees, or the CPU.

FID with its interval, KID and one more distance of 5,000 samples take two processor cores half a minute; a GPU draws
the samples in seconds.
"""

from __future__ import annotations

import functools

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

#: Free GPU memory required before using it: a block of distances and a few matrices of 2048 x 2048 need a quarter.
FREE_BYTES = 2 * 2**30


def to_metric_device(array: NDArray) -> Tensor:
    """Return the array as a tensor of its type on the device of the metrics."""
    return torch.from_numpy(np.ascontiguousarray(array)).to(_device())


@functools.cache
def _device() -> torch.device:
    """Choose once per process, which may be a driver next to workers that fill the GPU."""
    try:
        if torch.cuda.is_available() and torch.cuda.mem_get_info()[0] > FREE_BYTES:
            return torch.device("cuda")
    except RuntimeError:  # a GPU of another process alone (its exclusive mode)
        pass
    return torch.device("cpu")
