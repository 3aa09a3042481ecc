"""Sampling: noise to images through any solver, of any trained network."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from diffscale.core.keyed_random import Stream, at_step, normal
from diffscale.diffusion.denoiser import Estimate, Guidance, GuidedDenoiser, denoise_with_share
from diffscale.diffusion.multistep import DPMpp2M, DPMpp2MSDE, UniPC
from diffscale.diffusion.preconditioning import Preconditioning
from diffscale.diffusion.process import Diffusion
from diffscale.diffusion.solver_settings import SolverSettings
from diffscale.diffusion.solvers import DDIM, DDPM, Euler, Heun, HeunFlow

SOLVERS: dict[str, type[SolverSettings]] = {
    "ddpm": DDPM,
    "ddim": DDIM,
    "euler": Euler,
    "heun": Heun,
    "heun_flow": HeunFlow,
    "dpmpp_2m": DPMpp2M,
    "dpmpp_2m_sde": DPMpp2MSDE,
    "unipc": UniPC,
}

SMALLEST_LOGSNR_FOR_EPS = -12.0


class Evaluation(NamedTuple):
    """What a callback sees after each evaluation of the network."""

    number: int  # 0 … nfe − 1
    logsnr: float
    z: Tensor  # (B, C, H, W), the network's noisy image before input scaling
    x: Tensor  # (B, C, H, W), the estimated clean image after guidance and clipping, at the scale of z


@torch.no_grad()
def sample(
    diffusion: Diffusion,
    model: nn.Module,
    noise: Tensor,
    *,
    solver: SolverSettings,
    label: Tensor | None = None,
    guidance: Guidance | None = None,
    noise_fn: Callable[[int], Tensor] | None = None,
    callback: Callable[[Evaluation], None] | None = None,
    estimate: Estimate = denoise_with_share,
    **extra: Any,
) -> Tensor:
    """Images (B, C, H, W) float32 in [−1, 1] from unit normal noise of that shape; beyond that range if clip is none.

    label (B,) int64 or None; noise_fn(step) gives unit normal noise (B, C, H, W) to solvers that add some
    (`keyed_noise`); estimate: `denoise_with_share`, or a `CapturedDenoiser` that outlives the call; extra: further
    keyword arguments of the model. The path depends on the estimates x̂ alone, so it is the same for every prediction
    and interpolant of one denoiser.

    Raises ValueError for a stochastic solver without noise_fn, and as `check_sampler` does.
    """
    if solver.needs_noise and noise_fn is None:
        raise ValueError(f"solver {type(solver).__name__} adds noise: give noise_fn, such as keyed_noise(...)")
    levels = check_sampler(diffusion, solver)
    guided = GuidedDenoiser(diffusion, model, label, guidance or Guidance(), extra, estimate)
    return sample_at(levels, solver, guided, noise, noise_fn, callback)


@torch.no_grad()
def sample_at(
    levels: list[float],
    solver: SolverSettings,
    guided: GuidedDenoiser,
    noise: Tensor,
    noise_fn: Callable[[int], Tensor] | None = None,
    callback: Callable[[Evaluation], None] | None = None,
) -> Tensor:
    """`sample` at given noise levels: logsnr, increasing; the clean image that follows them is not in the list."""
    diffusion = guided.diffusion
    low, high = diffusion.clip_bounds()
    index = 0

    def denoise(y: Tensor, sigma: float) -> Tensor:
        nonlocal index
        logsnr = -2 * math.log(sigma)
        z = y if diffusion.interpolant == "ve" else y * _alpha(diffusion, logsnr)
        x = solver.clip_estimate(guided(z, logsnr), low, high)
        if callback is not None:
            callback(Evaluation(index, logsnr, z, x))
        index += 1
        return x

    sigmas = [math.exp(-level / 2) for level in levels] + [0.0]
    start, step_noise = noise.float() * sigmas[0], noise_fn or _no_noise
    if isinstance(solver, DDPM):
        y = solver.solve(denoise, start, sigmas, step_noise, lambda: guided.share)
    else:
        y = solver.solve(denoise, start, sigmas, step_noise)
    return diffusion.unscale_images(y)


def check_sampler(diffusion: Diffusion, solver: SolverSettings) -> list[float]:
    """Return the sampler's noise levels as logsnr.

    Raises ValueError for a grid that the schedule does not have, a learned variance that the network does not give, and
    for an eps network from a level at which x̂ is lost to rounding.
    """
    levels = solver.logsnr_grid(diffusion.schedule)
    if isinstance(solver, DDPM) and solver.variance == "learned" and not diffusion.learns_variance:
        raise ValueError(
            "solver variance = learned: the process has none; small, large and mix, or a network trained with "
            "diffusion.variance = learned_range"
        )
    if diffusion.prediction == "eps" and solver.clip == "none" and levels[0] < SMALLEST_LOGSNR_FOR_EPS:
        raise ValueError(
            f"solver clip = 'none': prediction eps at logsnr {levels[0]:.1f} gives x0 with errors multiplied by "
            f"{math.exp(-levels[0] / 2):.0f}; use clip = static or dynamic, or begin at logsnr "
            f"{SMALLEST_LOGSNR_FOR_EPS} or more (grid = karras with sigma_max up to 403)"
        )
    return levels


def keyed_noise(seed: int, positions: Tensor, shape: tuple[int, ...]) -> Callable[[int], Tensor]:
    """A noise_fn whose values for a sample depend on (seed, its position, step) alone; positions (B,) int64."""
    return lambda step: normal(seed, at_step(Stream.SAMPLE_CHURN, step), positions, shape)


def guided_nfe(diffusion: Diffusion, solver: SolverSettings, guidance: Guidance | None = None) -> tuple[int, int]:
    """(evaluations of the model, evaluations of the guide) for each sample.

    Counted by running the solver on one number. Classifier-free guidance costs the sum of both in the one model.
    """
    guidance = guidance or Guidance()
    seen: list[float] = []

    def denoise(y: Tensor, sigma: float) -> Tensor:
        seen.append(-2 * math.log(sigma))
        return y

    sigmas = [math.exp(-level / 2) for level in solver.logsnr_grid(diffusion.schedule)] + [0.0]
    solver.solve(denoise, torch.zeros(1, 1), sigmas, lambda step: torch.zeros(1, 1))
    return sum(map(guidance.needs_model, seen)), sum(map(guidance.active, seen))


def _alpha(diffusion: Preconditioning, logsnr: float) -> float:
    return diffusion.alpha_sigma(torch.tensor(logsnr, dtype=torch.float64))[0].item()


def _no_noise(step: int) -> Tensor:
    raise ValueError("this solver was given no noise_fn")
