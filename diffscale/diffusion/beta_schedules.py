"""DDPM's discrete schedules: betas, their cumulative product, and logsnr(t) by interpolation between the steps."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from diffscale.core.ranges import DiscreteSteps, Share


def linear_betas(steps: int = 1000, first: float = 1e-4, last: float = 0.02) -> Tensor:
    """(steps,) float64 betas, evenly spaced (Ho et al. 2020)."""
    return torch.linspace(first, last, steps, dtype=torch.float64)


def cosine_betas(steps: int = 1000, offset: float = 0.008, beta_max: float = 0.999) -> Tensor:
    """(steps,) float64 betas min(1 − f((i+1)/T)/f(i/T), beta_max) with f(u) = cos²((u+offset)/(1+offset)·π/2).

    Nichol and Dhariwal 2021, eq. 17.
    """
    u = torch.arange(steps + 1, dtype=torch.float64) / steps
    f = torch.cos((u + offset) / (1 + offset) * (math.pi / 2)).square()
    return (1 - f[1:] / f[:-1]).clamp(max=beta_max)


def alpha_bars(betas: Tensor) -> Tensor:
    """ᾱ_i = ∏_{s ≤ i} (1 − β_s), (steps,). Papers' plain α_i is 1 − β_i, of one step: only ᾱ belongs into the jump."""
    return torch.cumprod(1 - betas, dim=0)


def _check_betas(name: str, betas: Tensor) -> None:
    if len(betas) < 2 or not bool(((betas > 0) & (betas < 1)).all()):
        raise ValueError(f"{name}: at least 2 steps and betas above 0 and below 1, here {len(betas)} steps, {betas}")


class _Table:
    """logsnr of the steps i = 0 … T−1 at t = i / (T−1), linear in between, so strictly decreasing on [0, 1]."""

    _levels: Tensor  # (T,) float64

    def logsnr(self, t: Tensor) -> Tensor:
        levels = self._levels.to(t.device)
        place = t.double() * (len(levels) - 1)
        below = place.detach().floor().clamp(0, len(levels) - 2)
        index = below.long()
        first, second = levels[index], levels[index + 1]
        return (first + (place - below) * (second - first)).to(t.dtype)

    def t(self, logsnr: Tensor) -> Tensor:
        levels = self._levels.to(logsnr.device)
        value = logsnr.double().clamp(levels[-1], levels[0])
        index = (torch.searchsorted(-levels, -value) - 1).clamp(0, len(levels) - 2)
        first, second = levels[index], levels[index + 1]
        return ((index + (value - first) / (second - first)) / (len(levels) - 1)).to(logsnr.dtype)


def _levels(betas: Tensor) -> Tensor:
    bars = alpha_bars(betas)
    return bars.log() - torch.log1p(-bars)


@dataclass(frozen=True)
class DDPMLinear(_Table):
    """Betas evenly spaced from beta_start to beta_end (Ho et al. 2020)."""

    steps: DiscreteSteps = 1000  # steps of the discrete process
    beta_start: Share = 1e-4  # first beta, above 0 and below 1
    beta_end: Share = 0.02  # last beta, above 0 and below 1
    _levels: Tensor = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        betas = self.betas()
        _check_betas("ddpm_linear", betas)
        object.__setattr__(self, "_levels", _levels(betas))

    def betas(self) -> Tensor:
        return linear_betas(self.steps, self.beta_start, self.beta_end)


@dataclass(frozen=True)
class IDDPMCosine(_Table):
    """Betas of ᾱ = cos²((u + offset)/(1 + offset)·π/2), none above beta_max (Nichol and Dhariwal 2021)."""

    steps: DiscreteSteps = 1000  # steps of the discrete process
    offset: Share = 0.008  # of the cosine's argument; it keeps the first betas above 0
    beta_max: Share = 0.999  # largest beta, above 0 and below 1
    _levels: Tensor = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        betas = self.betas()
        _check_betas("iddpm_cosine", betas)
        object.__setattr__(self, "_levels", _levels(betas))

    def betas(self) -> Tensor:
        return cosine_betas(self.steps, self.offset, self.beta_max)
