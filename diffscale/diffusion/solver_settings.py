"""What all solvers share: how many steps on which grid of noise levels, and what is done to x̂ before it is used."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from diffscale.core.ranges import Exponent, Positive, Share, Steps
from diffscale.diffusion.schedules import OffsetCosineGamma, Schedule

Denoiser = Callable[[Tensor, float], Tensor]
"""(y, sigma) → x̂, with y = z / alpha = x + sigma·eps."""
StepNoise = Callable[[int], Tensor]
"""Step index → unit normal noise of y's shape."""

Grid = Literal["uniform_t", "uniform_logsnr", "karras", "flow", "offset_cosine", "respaced"]
Clip = Literal["static", "dynamic", "none"]


@dataclass(frozen=True)
class SolverSettings:
    """Every solver works on y = z / alpha, so its path is the same for every interpolant and prediction.

    Grids, n = steps levels and then the clean image:
    uniform_t: t = 1, 1 − 1/n, …, 1/n on the training schedule. uniform_logsnr: evenly spaced logsnr.
    karras: evenly spaced sigma^(1/rho) (Karras et al. 2022, eq. 5). flow: evenly spaced sigma/(alpha + sigma).
    offset_cosine: uniform t on the offset cosine (RIN). respaced: n of the schedule's own steps, evenly spaced from the
    first to the last (Nichol and Dhariwal 2021).
    """

    steps: Steps = 50  # noise levels
    grid: Grid = "uniform_t"  # how the noise levels are spaced
    rho: Exponent = 7.0  # exponent of the karras grid
    sigma_min: Positive = 0.002  # lowest exp(-logsnr/2) of karras and uniform_logsnr, within the schedule
    sigma_max: Positive = 80.0  # highest exp(-logsnr/2) of karras and uniform_logsnr, within the schedule
    clip: Clip = "static"  # limit of the estimated image: to the range of images, by Imagen's threshold, or none
    dynamic_percentile: Share = 0.995  # share of an image's values that the dynamic threshold leaves alone

    def __post_init__(self) -> None:
        for setting, valid, holds in (
            ("steps", "at least 1", self.steps >= 1),
            ("rho", "above 0", self.rho > 0),
            ("sigma_min", "above 0 and below sigma_max", 0 < self.sigma_min < self.sigma_max),
            ("dynamic_percentile", "above 0 and at most 1", 0 < self.dynamic_percentile <= 1),
            ("grid", "uniform_t, uniform_logsnr, karras, flow, offset_cosine, respaced", self.grid in Grid.__args__),  # type: ignore[attr-defined]
            ("clip", "static, dynamic, none", self.clip in Clip.__args__),  # type: ignore[attr-defined]
        ):
            if not holds:
                raise ValueError(f"solver {setting} = {getattr(self, setting)!r}: {valid}")

    @property
    def nfe(self) -> int:
        """Evaluations of the network for each sample, without guidance."""
        return self.steps

    @property
    def needs_noise(self) -> bool:
        return False

    def solve(self, denoise: Denoiser, y: Tensor, sigmas: list[float], noise: StepNoise) -> Tensor:
        """From y at sigmas[0] to the clean image at sigmas[-1] = 0."""
        raise NotImplementedError

    def logsnr_grid(self, schedule: Schedule) -> list[float]:
        """The `steps` noise levels as logsnr, strictly increasing; the clean image that follows them is not in it."""
        most, least = schedule.logsnr(torch.tensor([1.0, 0.0], dtype=torch.float64)).tolist()
        n = self.steps
        if self.grid == "uniform_t":
            return schedule.logsnr(_down_to_nth(1.0, 0.0, n)).tolist()
        if self.grid == "respaced":
            return schedule.logsnr(_respaced(schedule, n)).tolist()
        if self.grid == "flow":
            amounts = _down_to_nth(_sigmoid(-most / 2), _sigmoid(-least / 2), n)
            return (-2 * torch.logit(amounts)).clamp(min=most).tolist()
        if self.grid == "offset_cosine":
            cosine = OffsetCosineGamma()
            ends = cosine.t(torch.tensor([most, least], dtype=torch.float64)).tolist()
            return cosine.logsnr(_down_to_nth(ends[0], ends[1], n)).tolist()
        most, least = max(most, -2 * math.log(self.sigma_max)), min(least, -2 * math.log(self.sigma_min))
        if self.grid == "uniform_logsnr":
            return torch.linspace(most, least, n, dtype=torch.float64).tolist()
        roots = torch.linspace(math.exp(-most / 2 / self.rho), math.exp(-least / 2 / self.rho), n, dtype=torch.float64)
        return (-2 * self.rho * roots.log()).tolist()

    def clip_estimate(self, x: Tensor, low: float, high: float) -> Tensor:
        """x̂ (B, …) limited to [low, high], the range of clean images, in the way that `clip` says."""
        if self.clip == "none":
            return x
        if self.clip == "static":
            return x.clamp(low, high)
        middle, half = (low + high) / 2, (high - low) / 2
        unit = (x - middle) / half
        magnitude = torch.quantile(unit.abs().flatten(1), self.dynamic_percentile, dim=1).clamp(min=1)
        magnitude = magnitude.reshape(-1, *(1,) * (x.ndim - 1))
        return unit.clamp(-magnitude, magnitude) / magnitude * half + middle


def _down_to_nth(most: float, least: float, n: int) -> Tensor:
    """n points from `most` evenly down to most/n, the step before 0, or to `least` if that is more."""
    return torch.linspace(most, max(most / n, least), n, dtype=torch.float64)


def _respaced(schedule: Schedule, n: int) -> Tensor:
    """t of n of the schedule's steps, the last one first. Raises ValueError for a schedule that has not as many."""
    steps = getattr(schedule, "steps", 0)
    if n > steps:
        raise ValueError(f"solver grid = respaced, steps = {n}: the training schedule has {steps} numbered steps")
    index = torch.linspace(steps - 1, 0, n, dtype=torch.float64).round()
    return index / (steps - 1)


def _sigmoid(value: float) -> float:
    return 1 / (1 + math.exp(-value))
