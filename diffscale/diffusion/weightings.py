"""Loss weightings over logsnr. Each is written as the logarithm of its weight on ‖Δeps‖² and converted from there.

Errors in the spaces differ by factors of logsnr alone, ‖Δeps‖² = e^logsnr·‖Δx0‖² (any interpolant), so a weight w on
‖Δx0‖² is w·e^(−logsnr) on ‖Δeps‖². The effective weight over logsnr is this times the density with which training
draws logsnr; the two are kept apart.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from diffscale.core.ranges import LogSNR, NonNegative, Positive, Share


class Weighting(Protocol):
    """log_weight: (…) logsnr → ln of the weight on ‖Δeps‖², same shape. sigma_data: the data's standard deviation.

    per_logsnr: multiply by −½·d logsnr/dt, so that with uniform t it is a weight over logsnr itself.
    learned: divide by e^u and add u, u = model.uncertainty(logsnr).
    """

    per_logsnr: ClassVar[bool]
    learned: ClassVar[bool]

    def log_weight(self, logsnr: Tensor, sigma_data: float) -> Tensor: ...


@dataclass(frozen=True)
class _Plain:
    per_logsnr: ClassVar[bool] = False
    learned: ClassVar[bool] = False


@dataclass(frozen=True)
class UniformEps(_Plain):
    """1 on ‖Δeps‖²: DDPM's simple loss (Ho et al. 2020, eq. 14)."""

    def log_weight(self, logsnr: Tensor, sigma_data: float) -> Tensor:
        return torch.zeros_like(logsnr)


@dataclass(frozen=True)
class UniformX0(_Plain):
    """1 on ‖Δx0‖²."""

    def log_weight(self, logsnr: Tensor, sigma_data: float) -> Tensor:
        return -logsnr


@dataclass(frozen=True)
class UniformV(_Plain):
    """1 on ‖Δv‖² of the variance-preserving interpolant, which is 1 + e^logsnr on ‖Δx0‖² (SNR + 1)."""

    def log_weight(self, logsnr: Tensor, sigma_data: float) -> Tensor:
        return F.softplus(-logsnr)


@dataclass(frozen=True)
class UniformU(_Plain):
    """1 on the squared error of the flow's velocity of the linear interpolant: 1/sigma² on ‖Δx0‖²."""

    sigma_min: Share = 0.0  # smallest sigma divided by; JiT has 0.05

    def log_weight(self, logsnr: Tensor, sigma_data: float) -> Tensor:
        log_sigma = F.logsigmoid(-logsnr / 2)
        if self.sigma_min > 0:
            log_sigma = log_sigma.clamp(min=math.log(self.sigma_min))
        return -logsnr - 2 * log_sigma


@dataclass(frozen=True)
class MinSNR(_Plain):
    """min(SNR, gamma) on ‖Δx0‖² (Hang et al. 2023)."""

    gamma: Positive = 5.0  # largest weight

    def __post_init__(self) -> None:
        _check_above_zero("min_snr", gamma=self.gamma)

    def log_weight(self, logsnr: Tensor, sigma_data: float) -> Tensor:
        return (math.log(self.gamma) - logsnr).clamp(max=0)


@dataclass(frozen=True)
class SoftMinSNR(_Plain):
    """1 / (1/SNR + 1/gamma) on ‖Δx0‖² (Crowson et al. 2024)."""

    gamma: Positive = 4.0  # weight approached at high SNR

    def __post_init__(self) -> None:
        _check_above_zero("soft_min_snr", gamma=self.gamma)

    def log_weight(self, logsnr: Tensor, sigma_data: float) -> Tensor:
        return F.logsigmoid(math.log(self.gamma) - logsnr)


@dataclass(frozen=True)
class P2(_Plain):
    """(k + SNR)^(−p) on ‖Δeps‖² (Choi et al. 2022)."""

    k: Positive = 1.0  # what is added to the SNR
    p: NonNegative = 1.0  # exponent

    def __post_init__(self) -> None:
        _check_above_zero("p2", k=self.k)

    def log_weight(self, logsnr: Tensor, sigma_data: float) -> Tensor:
        return -self.p * (math.log(self.k) + F.softplus(logsnr - math.log(self.k)))


@dataclass(frozen=True)
class EDM(_Plain):
    """(sigma² + sigma_data²) / (sigma·sigma_data)² on ‖Δx0‖², 1 on ‖ΔF‖² (Karras et al. 2022, eq. 8)."""

    def log_weight(self, logsnr: Tensor, sigma_data: float) -> Tensor:
        return F.softplus(-logsnr - 2 * math.log(sigma_data))


@dataclass(frozen=True)
class Sigmoid(_Plain):
    """sigmoid(bias − logsnr) on ‖Δeps‖² as a weight over logsnr (Hoogeboom et al. 2025, "Simpler Diffusion").

    On ‖Δx0‖² it is e^bias·sigmoid(logsnr − bias).
    """

    bias: LogSNR = -3.0  # logsnr at which the weight is one half

    per_logsnr: ClassVar[bool] = True

    def log_weight(self, logsnr: Tensor, sigma_data: float) -> Tensor:
        return F.logsigmoid(self.bias - logsnr)


@dataclass(frozen=True)
class LearnedUncertainty(EDM):
    """EDM's weight over a learned variance: w/e^u·‖Δx0‖² + u (Karras et al. 2024, eq. 21). Sampling does not use u."""

    learned: ClassVar[bool] = True


WEIGHTINGS: dict[str, type] = {
    "uniform_eps": UniformEps,
    "uniform_x0": UniformX0,
    "uniform_v": UniformV,
    "uniform_u": UniformU,
    "min_snr": MinSNR,
    "soft_min_snr": SoftMinSNR,
    "p2": P2,
    "edm": EDM,
    "sigmoid": Sigmoid,
    "learned_uncertainty": LearnedUncertainty,
}


def _check_above_zero(name: str, **settings: float) -> None:
    for setting, value in settings.items():
        if value <= 0:
            raise ValueError(f"{name}: {setting} = {value}: above 0")
