"""Numbers of the steps of DDPM's discrete schedules from log SNR, for networks that embed them."""

from __future__ import annotations

import math

import torch
from torch import Tensor

NEAR_A_STEP = 0.01  # closer to a whole number than this is that number: float32's logsnr cannot tell


def linear_betas(steps: int, device: torch.device) -> Tensor:
    """Return the betas (steps,) float64 of Ho et al. 2020, 1e-4 to 0.02."""
    return torch.linspace(1e-4, 0.02, steps, dtype=torch.float64, device=device)


def cosine_betas(steps: int, device: torch.device) -> Tensor:
    """Return the betas (steps,) float64 of Nichol and Dhariwal 2021, eq. 17."""
    u = torch.arange(steps + 1, dtype=torch.float64, device=device) / steps
    f = torch.cos((u + 0.008) / 1.008 * (math.pi / 2)).square()
    return (1 - f[1:] / f[:-1]).clamp(max=0.999)


def step_number(logsnr: Tensor, betas: Tensor) -> Tensor:
    """Return the number, 0 to steps − 1, of the step with a log SNR, interpolated between steps.

    (B,) float32 → (B,) float32. A level beyond the first or the last step has that step's number.

    betas: (steps,) float64 of the schedule
    """
    log_bars = torch.log1p(-betas).cumsum(0)
    noise = torch.log(-torch.expm1(log_bars)) - log_bars  # −logsnr of the steps, increasing
    value = -logsnr.double()
    below = (torch.searchsorted(noise, value) - 1).clamp(0, len(betas) - 2)
    first, second = noise[below], noise[below + 1]
    number = (below + (value - first) / (second - first)).clamp(0, len(betas) - 1)
    whole = number.round()
    return torch.where((number - whole).abs() < NEAR_A_STEP, whole, number).float()
