"""Two-dimensional wavelet transforms that fold 2 × 2 pixels into channels, with exact inverses: Haar and LeGall 5/3.

Scaled as PyWavelets scales them ("haar", and "bior2.2" with mode "reflect"), so that unit noise keeps a variance near
one in every band. One level: (B, C, H, W) → (B, 4C, H/2, W/2), the bands in the order approximation, horizontal,
vertical, diagonal detail (PyWavelets' cA, cH, cV, cD), C channels each.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

Wavelet = Literal["haar", "5/3"]


def split(x: Tensor, dim: int, wavelet: Wavelet) -> tuple[Tensor, Tensor]:
    """One level along one axis of even length n → (low, high), each of length n/2."""
    even, odd = x.unflatten(dim, (-1, 2)).unbind(dim + 1)
    if wavelet == "haar":
        return (even + odd) * math.sqrt(0.5), (even - odd) * math.sqrt(0.5)
    high = odd - (even + after(even, dim)) / 2  # predict each odd sample from its even neighbours (JPEG 2000, F.4.8)
    low = even + (before(high, dim) + high) / 4  # and keep the mean
    return low * math.sqrt(2), high * -math.sqrt(0.5)


def merge(low: Tensor, high: Tensor, dim: int, wavelet: Wavelet) -> Tensor:
    """The inverse of `split`: the same lifting steps, undone in the opposite order."""
    if wavelet == "haar":
        even, odd = (low + high) * math.sqrt(0.5), (low - high) * math.sqrt(0.5)
    else:
        low, high = low * math.sqrt(0.5), high * -math.sqrt(2)
        even = low - (before(high, dim) + high) / 4
        odd = high + (even + after(even, dim)) / 2
    return torch.stack([even, odd], dim + 1).flatten(dim, dim + 1)


def after(even: Tensor, dim: int) -> Tensor:
    """The even sample to the right of each odd one; the signal is mirrored about its last sample."""
    n = even.shape[dim]
    return torch.cat([even.narrow(dim, 1, n - 1), even.narrow(dim, n - 1, 1)], dim)


def before(odd: Tensor, dim: int) -> Tensor:
    """The odd sample to the left of each even one; the signal is mirrored about its first sample."""
    return torch.cat([odd.narrow(dim, 0, 1), odd.narrow(dim, 0, odd.shape[dim] - 1)], dim)


def dwt(x: Tensor, wavelet: Wavelet, levels: int = 1) -> Tensor:
    """(B, C, H, W) → (B, C·4^levels, H/2^levels, W/2^levels); a further level transforms every band (wavelet packet).

    Raises ValueError for a name other than haar or 5/3, and for sides that 2^levels does not divide.
    """
    check(wavelet)
    if x.shape[2] % 2**levels or x.shape[3] % 2**levels:
        raise ValueError(f"size = {x.shape[2]} × {x.shape[3]}: expected multiples of {2**levels} for {levels} levels")
    for _ in range(levels):
        low, high = split(x, 2, wavelet)
        (a, v), (h, d) = split(low, 3, wavelet), split(high, 3, wavelet)
        x = torch.cat([a, h, v, d], dim=1)
    return x


def idwt(x: Tensor, wavelet: Wavelet, levels: int = 1) -> Tensor:
    """The inverse of `dwt`. Raises ValueError for another name, and for channels that 4^levels does not divide."""
    check(wavelet)
    if x.shape[1] % 4**levels:
        raise ValueError(f"channels = {x.shape[1]}: expected a multiple of {4**levels} for {levels} levels")
    for _ in range(levels):
        a, h, v, d = x.chunk(4, dim=1)
        x = merge(merge(a, v, 3, wavelet), merge(h, d, 3, wavelet), 2, wavelet)
    return x


def check(wavelet: str) -> None:
    if wavelet not in ("haar", "5/3"):
        raise ValueError(f"wavelet = {wavelet!r}: expected one of haar, 5/3")
