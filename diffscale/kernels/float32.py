"""Whether a GPU may round what float32 convolutions and matrix products read to TF32, which has 10 bits of mantissa.

PyTorch lets convolutions do so unless it is told otherwise; here float32 is float32, except in a run that asks for
tf32, so that features and samples do not depend on the kind of GPU. A CPU is not concerned.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch.backends import cuda, cudnn


def allow_tf32(allowed: bool) -> None:
    """For the whole process."""
    cuda.matmul.allow_tf32 = cudnn.allow_tf32 = allowed


@contextmanager
def exact_float32() -> Iterator[None]:
    """Without TF32 inside."""
    before = cuda.matmul.allow_tf32, cudnn.allow_tf32
    allow_tf32(False)
    try:
        yield
    finally:
        cuda.matmul.allow_tf32, cudnn.allow_tf32 = before
