"""Random numbers as functions of (seed, stream, position): without state, so the order of calls does not matter.

Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) in torch's 64-bit integers. The
key is the seed; the counter is (position, block of four values, stream). The integers, and so `uniform`, are identical
on every device; `normal` is computed in float64 and rounded once, so that devices differ by one unit in the last place
of float32 in about one value in 10⁸.
"""

from __future__ import annotations

import math
from enum import IntEnum

import torch
from torch import Tensor

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_MASK = 0xFFFFFFFF
_CHUNK = 1 << 15  # counters per pass on a CPU: bounds the memory of intermediates, and is the fastest


class Stream(IntEnum):
    """Purposes of random numbers. Two streams of one position are independent; so are the steps of `at_step`."""

    TIME = 0
    NOISE = 1
    FLIP = 2
    LABEL_DROP = 3
    SELF_COND = 4
    AUGMENT = 5
    SAMPLE_NOISE = 6
    SAMPLE_CHURN = 7
    SAMPLE_LABEL = 8
    VALIDATION = 9
    ORDER = 10
    LATENT = 11


def at_step(stream: int, step: int) -> int:
    """Return the stream of a sampler's step: 0 ≤ step < 2²⁴."""
    return int(stream) | (step + 1) << 8


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int, int]) -> tuple[Tensor, ...]:
    """Return the result of ten rounds of Philox4x32: four int64 tensors with values in [0, 2³²).

    counter: four int64 tensors of one shape, values in [0, 2³²).
    key: two integers in [0, 2³²).
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]  # the low 64 bits are right although the product overflows
        c0 = (p1 >> 32).bitwise_xor_(c1).bitwise_xor_(k0).bitwise_and_(_MASK)
        c2 = (p0 >> 32).bitwise_xor_(c3).bitwise_xor_(k1).bitwise_and_(_MASK)
        c1, c3 = p1, p0  # the high halves are masked off once c1 and c3 have passed into c0 and c2, or at the end
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return c0, c1 & _MASK, c2, c3 & _MASK


def uniform(seed: int, stream: int, positions: Tensor, shape: tuple[int, ...] = ()) -> Tensor:
    """Return uniform numbers in (0, 1), multiples of 2⁻²³ plus 2⁻²⁴; exact, so identical on every device.

    The result is float32 (B, *shape) on the positions' device; row i depends on positions[i] alone.

    seed: 0 ≤ seed < 2⁶⁴.
    stream: 0 ≤ stream < 2³² (`Stream`, `at_step`).
    positions: (B,) int64 ≥ 0.
    shape: shape of the numbers of one position.
    """
    count = math.prod(shape)
    words = torch.cat(_words(seed, stream, positions, -(-count // 4)), dim=1)[:, :count]
    return ((words >> 9).double() + 0.5).mul_(2.0**-23).float().reshape(len(positions), *shape)


def normal(seed: int, stream: int, positions: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Return unit normal numbers by Box and Muller (1958), |value| ≤ 6.66. Arguments and shapes as for `uniform`."""
    count = math.prod(shape)
    blocks = -(-count // 4)
    out = torch.empty(len(positions), 4, blocks, dtype=torch.float32, device=positions.device)
    rows = max(1, _CHUNK // max(blocks, 1)) if positions.device.type == "cpu" else max(len(positions), 1)
    for first in range(0, len(positions), rows):
        part = slice(first, first + rows)
        words = _words(seed, stream, positions[part], blocks)
        for pair in (0, 1):
            radius = words[pair].double().add_(0.5).mul_(2.0**-32).log_().mul_(-2).sqrt_()
            angle = words[pair + 2].double().add_(0.5).mul_(2 * math.pi * 2.0**-32)
            out[part, pair] = angle.cos().mul_(radius)
            out[part, pair + 2] = angle.sin_().mul_(radius)
    return out.flatten(1)[:, :count].reshape(len(positions), *shape)


def stratified_uniform(seed: int, positions: Tensor, global_batch: int) -> Tensor:
    """Return a number in (0, 1) per position, spread evenly over each global batch (Kingma et al. 2021, appendix I.1).

    Batch k = position // global_batch has the points (j / global_batch + r_k) mod 1, j = 0 … global_batch − 1, in an
    order in which any run of neighbouring positions is spread evenly too; r_k is keyed by (seed, k). Each number alone
    is uniform, whatever share of the batch is requested. The result is float32 (B,).

    positions: (B,) int64 ≥ 0.
    global_batch: images, at least 1.
    """
    if global_batch < 1:
        raise ValueError(f"global_batch = {global_batch}: at least 1")
    batch = positions // global_batch
    slot = (positions % global_batch) * _golden_stride(global_batch) % global_batch
    offset = uniform(seed, Stream.TIME, batch).double()
    return ((slot.double() / global_batch + offset) % 1).float().clamp_(2.0**-24, 1 - 2.0**-24)


def _golden_stride(n: int) -> int:
    """Return the number coprime to n that is nearest to n / golden ratio."""
    near = round(n * (math.sqrt(5) - 1) / 2)
    return next(s for d in range(n + 1) for s in (near - d, near + d) if s > 0 and math.gcd(s, n) == 1)


def _words(seed: int, stream: int, positions: Tensor, blocks: int) -> tuple[Tensor, ...]:
    """Return four (B, blocks) int64 in [0, 2³²): block j of position p is philox((p low, p high, j, stream), seed)."""
    if not 0 <= seed < 1 << 64:
        raise ValueError(f"seed = {seed}: at least 0 and below 2**64")
    shape = (len(positions), blocks)
    low = (positions & _MASK)[:, None].expand(shape)
    high = (positions >> 32)[:, None].expand(shape)
    block = torch.arange(blocks, device=positions.device).expand(shape)
    counter = (low, high, block, torch.full(shape, int(stream), device=positions.device))
    return philox(counter, (seed & _MASK, seed >> 32))
