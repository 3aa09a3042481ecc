"""Multistep solvers in half logsnr, h = ln(sigma / following): DPM-Solver++ (2M), its SDE version, and UniPC.

All are exponential integrators of the data prediction: exact for constant x̂, and one evaluation for each step.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import numpy as np
from torch import Tensor

from diffscale.core.ranges import NonNegative
from diffscale.diffusion.solver_settings import Denoiser, SolverSettings, StepNoise


@dataclass(frozen=True)
class DPMpp2M(SolverSettings):
    """DPM-Solver++ (2M), second order (Lu et al. 2022, algorithm 2). The first and the last step are of first order."""

    def solve(self, denoise: Denoiser, y: Tensor, sigmas: list[float], noise: StepNoise) -> Tensor:
        before: Tensor | None = None
        h_before = 0.0
        for sigma, following in pairwise(sigmas):
            x = denoise(y, sigma)
            if following == 0:
                return x
            h = math.log(sigma / following)
            estimate = x if before is None else x.lerp(before, -h / (2 * h_before))
            y = estimate.lerp(y, math.exp(-h))
            before, h_before = x, h
        return y


@dataclass(frozen=True)
class DPMpp2MSDE(SolverSettings):
    """SDE-DPM-Solver++ (2M), midpoint (Lu et al. 2022, section 5). eta 0 is DPMpp2M; 1 is the reverse SDE."""

    eta: NonNegative = 1.0  # amount of noise added and removed again

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.eta < 0:
            raise ValueError(f"solver dpmpp_2m_sde: eta = {self.eta}: 0 or more")

    @property
    def needs_noise(self) -> bool:
        return self.eta > 0

    def solve(self, denoise: Denoiser, y: Tensor, sigmas: list[float], noise: StepNoise) -> Tensor:
        before: Tensor | None = None
        h_before = 0.0
        for i, (sigma, following) in enumerate(pairwise(sigmas)):
            x = denoise(y, sigma)
            if following == 0:
                return x
            h = math.log(sigma / following)
            estimate = x if before is None else x.lerp(before, -h / (2 * h_before))
            y = estimate.mul(-math.expm1(-(1 + self.eta) * h)).add(y, alpha=math.exp(-(1 + self.eta) * h))
            if self.eta:
                y = y + following * math.sqrt(-math.expm1(-2 * self.eta * h)) * noise(i)
            before, h_before = x, h
        return y


@dataclass(frozen=True)
class UniPC(SolverSettings):
    """UniPC, predictor and corrector of one order, in data prediction (Zhao et al. 2023, algorithms 5 and 7).

    The corrector reuses the evaluation of the next step, so it costs none. The order is lower where there is too little
    history and in the last steps.
    """

    order: Literal[1, 2, 3] = 2  # order of the method
    variant: Literal["bh1", "bh2"] = "bh2"  # B(h) of the method: h, or e^h − 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.order not in (1, 2, 3) or self.variant not in ("bh1", "bh2"):
            raise ValueError(f"solver unipc: order = {self.order}, variant = {self.variant!r}: 1 to 3, bh1 or bh2")

    def solve(self, denoise: Denoiser, y: Tensor, sigmas: list[float], noise: StepNoise) -> Tensor:
        history: list[tuple[float, Tensor]] = []  # (sigma, x̂), oldest first
        start, order = y, 0  # where the last step began, and its order
        for i, (sigma, following) in enumerate(pairwise(sigmas)):
            x = denoise(y, sigma)
            if order:
                y = self._update(start, history, sigma, order, corrector=x)
            if following == 0:
                return x
            history = [*history[-2:], (sigma, x)]
            order = min(self.order, len(sigmas) - 1 - i, len(history))
            start, y = y, self._update(y, history, following, order)
        return y

    def _update(
        self,
        start: Tensor,
        history: list[tuple[float, Tensor]],
        sigma: float,
        order: int,
        corrector: Tensor | None = None,
    ) -> Tensor:
        """`start`, at the noise of history's end, taken to `sigma`; `corrector` is x̂ evaluated there already."""
        sigma0, x0 = history[-1]
        h = math.log(sigma0 / sigma)
        points = [(math.log(sigma0 / s) / h, x) for s, x in reversed(history[-order:-1])]
        if corrector is not None:
            points.append((1.0, corrector))
        scale = -h if self.variant == "bh1" else math.expm1(-h)
        y = x0.lerp(start, math.exp(-h))
        for weight, (place, x) in zip(_weights([p for p, _ in points], h, scale), points, strict=True):
            y = y.add(x - x0, alpha=-scale * weight / place)
        return y


def _weights(places: list[float], h: float, scale: float) -> list[float]:
    """The ρ of UniPC's equations 12 and 13: Σ_j ρ_j·r_j^(k−1) = φ_k(h)·k!/B(h) for k = 1 … as many as places r_j.

    One place has ρ = 1/2, which serves to second order and is what the authors use.
    """
    if len(places) == 1:
        return [0.5]
    phi, factorial, right = math.expm1(-h) / -h - 1, 1, []
    for k in range(1, len(places) + 1):
        right.append(phi * factorial / scale)
        factorial *= k + 1
        phi = phi / -h - 1 / factorial
    return np.linalg.solve(np.vander(places, increasing=True).T, right).tolist()
