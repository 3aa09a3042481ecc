"""Where products and eigenvalues behind the distances are computed: a GPU that this process sees, else the CPU.

FID with its interval, KID and one more distance of 5,000 samples take two processor cores half a minute, beside the
seconds in which a GPU makes the samples.
"""

from __future__ import annotations

import functools

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

ROOM = 2 * 2**30
"""Bytes that must be free there: a block of distances and a few matrices of 2048 x 2048 need a quarter of it."""


def there(array: NDArray) -> Tensor:
    """The array's values on that device, in its type."""
    return torch.from_numpy(np.ascontiguousarray(array)).to(_device())


@functools.cache
def _device() -> torch.device:
    """Chosen once for the process, which may be a driver beside the workers that fill the GPU."""
    try:
        if torch.cuda.is_available() and torch.cuda.mem_get_info()[0] > ROOM:
            return torch.device("cuda")
    except RuntimeError:  # a GPU of another process alone (its exclusive mode)
        pass
    return torch.device("cpu")
