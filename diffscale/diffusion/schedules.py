"""Noise schedules: logsnr as a strictly decreasing function of t ∈ [0, 1], t = 1 being the most noise.

Training draws t uniformly, so a distribution over noise levels (EDM's log-normal, flow matching's logit-normal) is a
schedule too: its quantile function. Every schedule is computed in float64, because 1 − gamma carries the signal's
precision at the clean end, and is limited to |logsnr| ≤ 20 where its formula goes to infinity.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from diffscale.core.ranges import Factor, LogSNR, Share, Size

LOGSNR_LIMIT = 20.0
FLAT_SIGMOID = 30.0  # where float64 cannot tell the logistic function from 0 or 1 any more


class Schedule(Protocol):
    """logsnr(t) and t(logsnr) for tensors of any shape, computed in float64, returned in the argument's dtype."""

    def logsnr(self, t: Tensor) -> Tensor: ...

    def t(self, logsnr: Tensor) -> Tensor: ...


def slope(schedule: Schedule, t: Tensor) -> Tensor:
    """d logsnr / dt at t, of any shape; zero where the schedule is limited. By automatic differentiation."""
    return torch.func.jvp(schedule.logsnr, (t,), (torch.ones_like(t),))[1]


def _from_gamma(gamma: Tensor) -> Tensor:
    return (gamma.log() - torch.log1p(-gamma)).clamp(-LOGSNR_LIMIT, LOGSNR_LIMIT)


@dataclass(frozen=True)
class LinearGamma:
    """gamma = 1 − t (Chen 2023, "On the Importance of Noise Scheduling for Diffusion Models"; RIN's training)."""

    def logsnr(self, t: Tensor) -> Tensor:
        return _from_gamma(1 - t.double()).to(t.dtype)

    def t(self, logsnr: Tensor) -> Tensor:
        return torch.sigmoid(-logsnr.double()).to(logsnr.dtype)


@dataclass(frozen=True)
class CosineGamma:
    """Chen's cosine(start, end, tau): a piece of cos(·π/2)^(2·tau), stretched to run from 1 to 0."""

    start: Share = 0.0  # where the piece starts, 0 ≤ start < end
    end: Share = 1.0  # where the piece ends, end ≤ 1; the authors' code has 0.5 by default
    tau: Factor = 1.0  # exponent

    def __post_init__(self) -> None:
        if not (0 <= self.start < self.end <= 1 and self.tau > 0):
            raise ValueError(f"cosine_gamma: start, end, tau = {self}: valid are 0 <= start < end <= 1 and tau > 0")

    def _ends(self) -> tuple[float, float]:
        at_start, at_end = (math.cos(a * math.pi / 2) ** (2 * self.tau) for a in (self.start, self.end))
        return at_start, at_end

    def logsnr(self, t: Tensor) -> Tensor:
        first, last = self._ends()
        angle = (self.start + (self.end - self.start) * t.double()) * (math.pi / 2)
        return _from_gamma((angle.cos().clamp(min=0) ** (2 * self.tau) - last) / (first - last)).to(t.dtype)

    def t(self, logsnr: Tensor) -> Tensor:
        first, last = self._ends()
        power = torch.sigmoid(logsnr.double()) * (first - last) + last
        angle = torch.acos((power ** (0.5 / self.tau)).clamp(max=1))
        return ((angle * (2 / math.pi) - self.start) / (self.end - self.start)).clamp(0, 1).to(logsnr.dtype)


@dataclass(frozen=True)
class SigmoidGamma:
    """Sigmoid(start, end, tau) of Jabri et al. 2022 and Chen 2023: a piece of the logistic curve stretched to 1 … 0."""

    start: LogSNR = -3.0  # where the piece starts, below end
    end: LogSNR = 3.0  # where the piece ends
    tau: Factor = 1.0  # temperature; RIN on CIFAR-10 has 0.9

    def __post_init__(self) -> None:
        if not (self.start < self.end and self.tau > 0):
            raise ValueError(f"sigmoid_gamma: start, end, tau = {self}: valid are start < end and tau > 0")
        if max(abs(self.start), abs(self.end)) / self.tau > FLAT_SIGMOID:
            raise ValueError(f"sigmoid_gamma: start, end, tau = {self}: |start| / tau and |end| / tau are at most 30")

    def _ends(self) -> tuple[float, float]:
        at_start, at_end = (1 / (1 + math.exp(-a / self.tau)) for a in (self.start, self.end))
        return at_start, at_end

    def logsnr(self, t: Tensor) -> Tensor:
        first, last = self._ends()
        curve = torch.sigmoid((self.start + (self.end - self.start) * t.double()) / self.tau)
        return _from_gamma(((last - curve) / (last - first)).clamp(0, 1)).to(t.dtype)

    def t(self, logsnr: Tensor) -> Tensor:
        first, last = self._ends()
        curve = last - torch.sigmoid(logsnr.double()) * (last - first)
        point = torch.logit(curve) * self.tau
        return ((point - self.start) / (self.end - self.start)).clamp(0, 1).to(logsnr.dtype)


@dataclass(frozen=True)
class OffsetCosineGamma:
    """gamma = cos²((t + ns)/(1 + ds)·π/2), the bare `cosine` of pix2seq's code, with which RIN is sampled."""

    ns: Share = 0.0002  # offset of t, 0 ≤ ns < ds: keeps gamma below 1
    ds: Share = 0.00025  # stretch of t: keeps gamma above 0

    def __post_init__(self) -> None:
        if not 0 <= self.ns < self.ds:
            raise ValueError(f"offset_cosine_gamma: ns, ds = {self.ns}, {self.ds}: valid are 0 <= ns < ds")

    def logsnr(self, t: Tensor) -> Tensor:
        angle = (t.double() + self.ns) / (1 + self.ds) * (math.pi / 2)
        return (-2 * angle.tan().log()).clamp(-LOGSNR_LIMIT, LOGSNR_LIMIT).to(t.dtype)

    def t(self, logsnr: Tensor) -> Tensor:
        angle = torch.atan(torch.exp(-logsnr.double() / 2))
        return (angle * (2 / math.pi) * (1 + self.ds) - self.ns).clamp(0, 1).to(logsnr.dtype)


@dataclass(frozen=True)
class SimpleCosine:
    """Simple diffusion's cosine in logsnr, shifted and interpolated by resolution (Hoogeboom et al. 2023, section 3.1).

    Shifted by 2 ln(noise_resolution / resolution), so that an image has, averaged down to noise_resolution, the SNR of
    the plain schedule there. With noise_resolution_low too, the shift goes from noise_resolution's at the clean end to
    noise_resolution_low's at the noise end, linearly in t.
    """

    logsnr_min: LogSNR = -15.0  # lowest logsnr, before the shift
    logsnr_max: LogSNR = 15.0  # highest logsnr, before the shift
    noise_resolution: Size | None = None  # side whose noise is kept, 32 or 64; None does not shift
    noise_resolution_low: Size | None = None  # the same at the noise end, at most noise_resolution; None: equal
    resolution: int | None = None  # side of the images: given by the data

    def __post_init__(self) -> None:
        if not self.logsnr_min < self.logsnr_max:
            raise ValueError(f"simple_cosine: logsnr_min = {self.logsnr_min}: below logsnr_max = {self.logsnr_max}")
        if self.noise_resolution is None:
            if self.noise_resolution_low is not None:
                raise ValueError("simple_cosine: noise_resolution_low needs noise_resolution, the one of the clean end")
        elif self.resolution is None:
            raise ValueError("simple_cosine: noise_resolution shifts by the images' resolution, which is not given")
        elif not 0 < (self.noise_resolution_low or self.noise_resolution) <= self.noise_resolution:
            raise ValueError(
                f"simple_cosine: noise_resolution_low = {self.noise_resolution_low}: valid are 1 to noise_resolution"
            )

    def _angles(self) -> tuple[float, float]:
        return math.atan(math.exp(-self.logsnr_max / 2)), math.atan(math.exp(-self.logsnr_min / 2))

    def _shifts(self) -> tuple[float, float]:
        """Added at t = 0 and at t = 1."""
        if self.noise_resolution is None or self.resolution is None:
            return 0.0, 0.0
        low = self.noise_resolution_low or self.noise_resolution
        return 2 * math.log(self.noise_resolution / self.resolution), 2 * math.log(low / self.resolution)

    def logsnr(self, t: Tensor) -> Tensor:
        first, last = self._angles()
        clean, noisy = self._shifts()
        s = t.double()
        return (clean + s * (noisy - clean) - 2 * torch.tan(first + (last - first) * s).log()).to(t.dtype)

    def t(self, logsnr: Tensor) -> Tensor:
        first, last = self._angles()
        clean, noisy = self._shifts()
        if clean == noisy:
            angle = torch.atan(torch.exp((clean - logsnr.double()) / 2))
            return ((angle - first) / (last - first)).clamp(0, 1).to(logsnr.dtype)
        low, high = torch.zeros_like(logsnr.double()), torch.ones_like(logsnr.double())
        for _ in range(54):  # bisection to float64's precision: the interpolated curve has no closed inverse
            middle = (low + high) / 2
            above = self.logsnr(middle) > logsnr
            low, high = torch.where(above, middle, low), torch.where(above, high, middle)
        return ((low + high) / 2).to(logsnr.dtype)
