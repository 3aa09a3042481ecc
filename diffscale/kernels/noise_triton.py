"""The kernel of `noise`: Philox and the transformation of Box and Muller, four normal numbers from each counter.

It is a module of its own because importing Triton takes time.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl
from torch import Tensor

BLOCK = 256  # counters of one program

_STEP = tl.constexpr(2.0**-32)
_TURN = tl.constexpr(2 * math.pi * 2.0**-32)


@triton.jit
def _place(number, pixels, channels, CHANNELS_LAST: tl.constexpr):
    if CHANNELS_LAST:
        return number % pixels * channels + number // pixels
    return number


@triton.jit
def _normal(
    out, positions, seed, stream, blocks, count, pixels, channels, CHANNELS_LAST: tl.constexpr, SIZE: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1) * SIZE + tl.arange(0, SIZE)
    position = tl.load(positions + row)
    low = (block * 0 + (position & 0xFFFFFFFF)).to(tl.uint32)
    high = (block * 0 + (position >> 32)).to(tl.uint32)
    purpose = (block * 0 + stream).to(tl.uint32)
    a, b, c, d = tl.philox(seed, low, high, block.to(tl.uint32), purpose)
    for pair in tl.static_range(2):
        first = a if pair == 0 else b
        second = c if pair == 0 else d
        radius = tl.sqrt(tl.log((first.to(tl.float64) + 0.5) * _STEP) * -2.0)
        angle = (second.to(tl.float64) + 0.5) * _TURN
        for half in tl.static_range(2):
            value = (tl.cos(angle) if half == 0 else tl.sin(angle)) * radius
            number = (pair + 2 * half) * blocks + block
            place = row * count + _place(number, pixels, channels, CHANNELS_LAST)
            tl.store(out + place, value.to(tl.float32), mask=(block < blocks) & (number < count))


def fill_normal(out: Tensor, seed: int, stream: int, positions: Tensor) -> None:
    """Fill a tensor, float32 (B, C, H, W) in either memory order, with the numbers of `draw_normal`.

    seed: as a signed 64-bit integer
    """
    channels, pixels = out.shape[1], math.prod(out.shape[2:])
    count = channels * pixels
    blocks = -(-count // 4)
    grid = (len(positions), triton.cdiv(blocks, BLOCK))
    if out.numel():
        sizes = blocks, count, pixels, channels
        channels_last = not out.is_contiguous()
        _normal[grid](out, positions.contiguous(), seed, stream, *sizes, CHANNELS_LAST=channels_last, SIZE=BLOCK)
