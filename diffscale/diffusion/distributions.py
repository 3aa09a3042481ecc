"""Schedules that are the quantile functions of a distribution of noise levels, so that a uniform t draws from it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from diffscale.core.ranges import Factor, LogSNR, Size
from diffscale.diffusion.schedules import LOGSNR_LIMIT


def _normal_quantile(t: Tensor, mean: float, std: float) -> Tensor:
    """The logsnr that a share t of N(mean, std²) lies above."""
    return (mean - std * torch.special.ndtri(t.double())).clamp(-LOGSNR_LIMIT, LOGSNR_LIMIT).to(t.dtype)


def _normal_share(logsnr: Tensor, mean: float, std: float) -> Tensor:
    return (0.5 * torch.special.erfc((logsnr.double() - mean) / (std * math.sqrt(2)))).to(logsnr.dtype)


@dataclass(frozen=True)
class EDMLogNormal:
    """ln sigma ~ N(p_mean, p_std²) (Karras et al. 2022), which is logsnr ~ N(−2·p_mean, 4·p_std²)."""

    p_mean: LogSNR = -1.2  # mean of ln sigma; EDM2 on ImageNet-64: -0.8
    p_std: Factor = 1.2  # standard deviation of ln sigma; EDM2 on ImageNet-64: 1.6

    def __post_init__(self) -> None:
        if self.p_std <= 0:
            raise ValueError(f"edm_lognormal: p_std = {self.p_std}: above 0")

    def logsnr(self, t: Tensor) -> Tensor:
        return _normal_quantile(t, -2 * self.p_mean, 2 * self.p_std)

    def t(self, logsnr: Tensor) -> Tensor:
        return _normal_share(logsnr, -2 * self.p_mean, 2 * self.p_std)


@dataclass(frozen=True)
class FlowUniform:
    """Flow matching with uniform time: logsnr = 2 ln((1 − t)/t), shifted by resolution if requested."""

    noise_resolution: Size | None = None  # side whose noise is kept: shifts by 2 ln(it / resolution); None does not
    resolution: int | None = None  # side of the images: given by the data

    def logsnr(self, t: Tensor) -> Tensor:
        shift = _shift("flow_uniform", self.noise_resolution, self.resolution)
        return (shift - 2 * torch.logit(t.double())).clamp(-LOGSNR_LIMIT, LOGSNR_LIMIT).to(t.dtype)

    def t(self, logsnr: Tensor) -> Tensor:
        shift = _shift("flow_uniform", self.noise_resolution, self.resolution)
        return torch.sigmoid((shift - logsnr.double()) / 2).to(logsnr.dtype)


@dataclass(frozen=True)
class FlowLogitNormal:
    """logit of the flow's time ~ N(mean, std²) (Esser et al. 2024), which is logsnr ~ N(−2·mean, 4·std²).

    JiT (Li and He 2025) has mean 0.8, std 0.8, noise_resolution 256 in this convention, where t = 1 is noise.
    """

    mean: LogSNR = 0.0  # mean of the logit of t; above 0 is more noise
    std: Factor = 1.0  # standard deviation of the logit of t
    noise_resolution: Size | None = None  # side whose noise is kept: shifts by 2 ln(it / resolution); None does not
    resolution: int | None = None  # side of the images: given by the data

    def __post_init__(self) -> None:
        if self.std <= 0:
            raise ValueError(f"flow_logit_normal: std = {self.std}: above 0")

    def _mean(self) -> float:
        return -2 * self.mean + _shift("flow_logit_normal", self.noise_resolution, self.resolution)

    def logsnr(self, t: Tensor) -> Tensor:
        return _normal_quantile(t, self._mean(), 2 * self.std)

    def t(self, logsnr: Tensor) -> Tensor:
        return _normal_share(logsnr, self._mean(), 2 * self.std)


def _shift(name: str, noise_resolution: int | None, resolution: int | None) -> float:
    if noise_resolution is None:
        return 0.0
    if resolution is None:
        raise ValueError(f"{name}: noise_resolution shifts by the images' resolution, which is not given")
    return 2 * math.log(noise_resolution / resolution)
