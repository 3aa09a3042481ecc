"""One-step solvers: DDPM's ancestral sampler, DDIM, Euler, EDM's Heun, and Heun in the flow's time.

In y = z / alpha the probability flow is dy/dsigma = (y − D(y, sigma)) / sigma for every schedule and interpolant
(Karras et al. 2022, eq. 1 with s = 1), and the last step, to sigma = 0, is y = D.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from torch import Tensor

from diffscale.core.ranges import NonNegative, Share
from diffscale.diffusion.solver_settings import Clip, Denoiser, Grid, SolverSettings, StepNoise


@dataclass(frozen=True)
class DDPM(SolverSettings):
    """Ancestral sampling from q(z_s | z_t, x̂) (Ho et al. 2020, eqs. 6-7; Kingma et al. 2021 in logsnr).

    variance small: the posterior's own β̃; large: β = 1 − alpha_t²/alpha_s² (variance preserving); mix: their geometric
    mean weighted by variance_mix (Hoogeboom et al. 2023); learned: that mean weighted by the network for each pixel
    (Nichol and Dhariwal 2021), which needs a process with variance = learned_range.
    """

    variance: Literal["small", "large", "mix", "learned"] = "small"  # variance of the added noise
    variance_mix: Share = 0.3  # share of large in the mix

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.variance not in ("small", "large", "mix", "learned") or not 0 <= self.variance_mix <= 1:
            raise ValueError(
                f"solver ddpm: variance = {self.variance!r}, variance_mix = {self.variance_mix}: small, large, mix or "
                "learned, and between 0 and 1"
            )

    @property
    def needs_noise(self) -> bool:
        return True

    def solve(
        self,
        denoise: Denoiser,
        y: Tensor,
        sigmas: list[float],
        noise: StepNoise,
        share: Callable[[], Tensor | None] = lambda: None,
    ) -> Tensor:
        """See SolverSettings.solve. share: returns the learned share of ln β at the level evaluated last, or None."""
        for i, (sigma, following) in enumerate(pairwise(sigmas)):
            x = denoise(y, sigma)
            if following == 0:
                return x
            y = x.lerp(y, (following / sigma) ** 2) + self._std(sigma, following, share()) * noise(i)
        return y

    def _std(self, sigma: float, following: float, share: Tensor | None) -> float | Tensor:
        """Of the noise added to y. In y, β̃ is s²(1 − s²/σ²) and β is (1 − alpha_σ²/alpha_s²)/alpha_s²."""
        small = following**2 * (1 - (following / sigma) ** 2)
        large = (1 + following**2) * (1 - (1 + following**2) / (1 + sigma**2))
        if self.variance == "learned" and share is not None:
            return math.sqrt(small) * (0.5 * math.log(large / small) * share).exp()
        mix = {"small": 0.0, "large": 1.0, "mix": self.variance_mix, "learned": 0.0}[self.variance]
        return math.sqrt(small ** (1 - mix) * large**mix)


@dataclass(frozen=True)
class DDIM(SolverSettings):
    """Song et al. 2021, eqs. 12 and 16. eta 0 is deterministic, 1 is DDPM's posterior variance."""

    eta: Share = 0.0  # share of DDPM's noise that is added

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.eta <= 1:
            raise ValueError(f"solver ddim: eta = {self.eta}: between 0 and 1")

    @property
    def needs_noise(self) -> bool:
        return self.eta > 0

    def solve(self, denoise: Denoiser, y: Tensor, sigmas: list[float], noise: StepNoise) -> Tensor:
        for i, (sigma, following) in enumerate(pairwise(sigmas)):
            x = denoise(y, sigma)
            if following == 0:
                return x
            added = self.eta * following * math.sqrt(1 - (following / sigma) ** 2)
            y = x.lerp(y, math.sqrt(following**2 - added**2) / sigma)
            if added:
                y = y + added * noise(i)
        return y


@dataclass(frozen=True)
class Euler(SolverSettings):
    """Euler's method on dy/dsigma. With the linear interpolant it is Euler's method on the flow's time too."""

    def solve(self, denoise: Denoiser, y: Tensor, sigmas: list[float], noise: StepNoise) -> Tensor:
        for sigma, following in pairwise(sigmas):
            slope = (y - denoise(y, sigma)) / sigma
            y = y.add(slope, alpha=following - sigma)
        return y


@dataclass(frozen=True)
class Heun(SolverSettings):
    """EDM's second-order sampler with stochastic churn (Karras et al. 2022, algorithm 2). The last step is Euler's.

    Not an exponential integrator: on grids with a step from a very high sigma (uniform_t from logsnr −20) it diverges.
    """

    grid: Grid = "karras"  # how the noise levels are spaced
    clip: Clip = "none"  # limit of the estimated clean image; EDM has none
    s_churn: NonNegative = 0.0  # amount of noise added and removed again over the whole run; 0 is deterministic
    s_tmin: NonNegative = 0.0  # lowest sigma with churn
    s_tmax: NonNegative | None = None  # highest sigma with churn; None does not limit
    s_noise: NonNegative = 1.0  # standard deviation of the added noise

    @property
    def nfe(self) -> int:
        return 2 * self.steps - 1

    @property
    def needs_noise(self) -> bool:
        return self.s_churn > 0

    def solve(self, denoise: Denoiser, y: Tensor, sigmas: list[float], noise: StepNoise) -> Tensor:
        gain = min(self.s_churn / self.steps, math.sqrt(2) - 1)
        for i, (sigma, following) in enumerate(pairwise(sigmas)):
            below = self.s_tmax is None or sigma <= self.s_tmax
            if gain > 0 and self.s_tmin <= sigma and below:
                raised = sigma * (1 + gain)
                y = y + math.sqrt(raised**2 - sigma**2) * self.s_noise * noise(i)
                sigma = raised
            slope = (y - denoise(y, sigma)) / sigma
            step = following - sigma
            end = y.add(slope, alpha=step)
            if following > 0:
                slope_end = (end - denoise(end, following)) / following
                end = y.add(slope, alpha=step / 2).add(slope_end, alpha=step / 2)
            y = end
        return y


@dataclass(frozen=True)
class HeunFlow(SolverSettings):
    """Heun's method on the flow's time, dz/da = (z − D)/a for z = (1 − a)·x + a·eps (Li and He 2025). The last step is
    Euler's.
    """

    grid: Grid = "flow"
    smallest_amount: Share = 0.0  # smallest a divided by; JiT has 0.05

    @property
    def nfe(self) -> int:
        return 2 * self.steps - 1

    def solve(self, denoise: Denoiser, y: Tensor, sigmas: list[float], noise: StepNoise) -> Tensor:
        def velocity(z: Tensor, sigma: float) -> Tensor:
            return (z - denoise(z * (1 + sigma), sigma)) / max(sigma / (1 + sigma), self.smallest_amount)

        z = y / (1 + sigmas[0])
        for sigma, following in pairwise(sigmas):
            step = following / (1 + following) - sigma / (1 + sigma)
            slope = velocity(z, sigma)
            end = z.add(slope, alpha=step)
            if following > 0:
                end = z.add(slope, alpha=step / 2).add(velocity(end, following), alpha=step / 2)
            z = end
        return z
