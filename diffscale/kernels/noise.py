"""The noise of a batch in one kernel on a GPU (Triton), in torch's operations elsewhere.

The kernel computes the integers of `core.keyed_random.normal` and the same float64 functions of them. It is compiled
on its first use. Where that fails, for want of a C compiler say, the operations are used and a warning says so.
"""

from __future__ import annotations

import importlib.util
import logging

import torch
from torch import Tensor

from diffscale.core.keyed_random import normal

log = logging.getLogger(__name__)

_failed = False


def draw_normal(
    seed: int, stream: int, positions: Tensor, shape: tuple[int, ...], *, channels_last: bool = False
) -> Tensor:
    """Return unit normal numbers, float32 (B, C, H, W), keyed by (seed, stream, position) as `keyed_random.normal`.

    seed: 0 ≤ seed < 2⁶⁴
    stream: 0 ≤ stream < 2³²
    positions: (B,) int64 ≥ 0; the numbers are on their device
    shape: (C, H, W)
    channels_last: memory order of the result
    """
    if positions.device.type == "cuda" and not _failed and importlib.util.find_spec("triton") is not None:
        if not 0 <= seed < 1 << 64:
            raise ValueError(f"seed = {seed}: at least 0 and below 2**64")
        signed = seed - (1 << 64) if seed >> 63 else seed
        return _fused(signed, stream, positions, list(shape), channels_last)
    return _ordered(normal(seed, stream, positions, shape), channels_last)


@torch.library.custom_op("diffscale::normal", mutates_args=())
def _fused(seed: int, stream: int, positions: Tensor, shape: list[int], channels_last: bool) -> Tensor:
    global _failed
    try:
        from diffscale.kernels.noise_triton import fill_normal  # import cost

        out = _empty(positions, shape, channels_last)
        fill_normal(out, seed, stream, positions)
        return out
    except Exception as error:
        _failed = True
        log.warning("noise is drawn by many operations instead of one kernel, because Triton failed: %s", error)
        return _ordered(normal(seed % (1 << 64), stream, positions, tuple(shape)), channels_last)


@_fused.register_fake
def _(seed: int, stream: int, positions: Tensor, shape: list[int], channels_last: bool) -> Tensor:
    return _empty(positions, shape, channels_last)


def _empty(positions: Tensor, shape: list[int], channels_last: bool) -> Tensor:
    layout = torch.channels_last if channels_last else torch.contiguous_format
    size = (len(positions), *shape)
    return torch.empty(size, dtype=torch.float32, device=positions.device, memory_format=layout)


def _ordered(x: Tensor, channels_last: bool) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
