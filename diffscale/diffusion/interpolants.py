"""Interpolants: the log signal-to-noise ratio to (alpha, sigma) of z = alpha·x0 + sigma·eps.

Two interpolants at one logsnr differ by a scalar factor on z and by nothing else: logsnr = 2 ln(alpha / sigma) in all.
Ho et al. 2020 (vp), Liu et al. 2023 and Lipman et al. 2023 (linear, rectified flow), Karras et al. 2022 (ve).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def vp(logsnr: Tensor) -> tuple[Tensor, Tensor]:
    """Variance preserving: alpha² + sigma² = 1. Any shape → (alpha, sigma) of that shape and dtype."""
    return torch.sigmoid(logsnr).sqrt(), torch.sigmoid(-logsnr).sqrt()


def linear(logsnr: Tensor) -> tuple[Tensor, Tensor]:
    """alpha + sigma = 1: `mix` with amount = sigma, and rectified flow with t = sigma."""
    return torch.sigmoid(logsnr / 2), torch.sigmoid(-logsnr / 2)


def ve(logsnr: Tensor) -> tuple[Tensor, Tensor]:
    """Variance exploding: alpha = 1, sigma = exp(−logsnr / 2), EDM's sigma."""
    return torch.ones_like(logsnr), torch.exp(-logsnr / 2)


INTERPOLANTS: dict[str, Callable[[Tensor], tuple[Tensor, Tensor]]] = {"vp": vp, "linear": linear, "ve": ve}


def per_image(values: Tensor, like: Tensor) -> Tensor:
    """(B,) → (B, 1, …, 1), to multiply `like` (B, …)."""
    return values.reshape(-1, *(1,) * (like.ndim - 1))
