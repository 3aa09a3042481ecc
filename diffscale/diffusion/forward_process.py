"""The forward process written out step by step, for teaching and tests.

A linear mix of image and noise, its discrete form, and DDPM's chain with its closed form.
"""

from __future__ import annotations

import torch
from torch import Tensor

from diffscale.diffusion.interpolants import per_image


def mix(x: Tensor, noise: Tensor, amount: Tensor) -> Tensor:
    """Return x·(1 − amount) + noise·amount.

    This is the `linear` interpolant with sigma = amount, whose logsnr is 2 ln((1 − amount) / amount).

    x, noise: (B, …)
    amount: (B,) in [0, 1]; 1 is noise alone
    """
    share = per_image(amount, x)
    return x * (1 - share) + noise * share


def add_noise(x: Tensor, noise: Tensor, timesteps: Tensor, num_train_timesteps: int = 1000) -> Tensor:
    """Return `mix` by the discrete amount timesteps / num_train_timesteps.

    x, noise: (B, …)
    timesteps: (B,) integers from 0
    """
    if num_train_timesteps < 1:
        raise ValueError(f"num_train_timesteps = {num_train_timesteps}: expected at least 1")
    return mix(x, noise, timesteps.to(x.dtype) / num_train_timesteps)


def q_sample_step(x_previous: Tensor, noise: Tensor, beta: Tensor) -> Tensor:
    """Sample q(x_t | x_{t−1}) = N(√(1−β_t)·x_{t−1}, β_t·I), one step of the chain (Ho et al. 2020, eq. 2).

    x_previous, noise: (B, …)
    beta: (B,) in (0, 1)
    """
    share = per_image(beta, x_previous)
    return (1 - share).sqrt() * x_previous + share.sqrt() * noise


def q_sample(x0: Tensor, noise: Tensor, alpha_bar: Tensor) -> Tensor:
    """Sample q(x_t | x_0), t steps of the chain at once: √ᾱ_t·x0 + √(1−ᾱ_t)·noise (Ho et al. 2020, eq. 4).

    ᾱ_t is the cumulative product ∏_{s ≤ t}(1 − β_s), `alpha_bars`. Some notes write α_t here; in the paper α_t is the
    single factor 1 − β_t, with which the formula would describe one step only.

    x0, noise: (B, …)
    alpha_bar: (B,) in [0, 1]
    """
    share = per_image(alpha_bar, x0)
    return share.sqrt() * x0 + (1 - share).sqrt() * noise


def measured_logsnr(z: Tensor, x0: Tensor) -> Tensor:
    """Measure logsnr of z (B, …) by regression on its clean image x0 (B, …), for any interpolant. Returns (B,).

    It is ln of the variance explained by x0 over the residual variance, with x0's own variance taken as 1: an image of
    low contrast, or in the range [0, 1] instead of [−1, 1], has a lower one.
    """
    clean, noisy = x0.flatten(1).double(), z.flatten(1).double()
    clean, noisy = clean - clean.mean(1, keepdim=True), noisy - noisy.mean(1, keepdim=True)
    gain = (clean * noisy).sum(1) / clean.square().sum(1)
    residual = noisy - gain[:, None] * clean
    return torch.log((gain[:, None] * clean).square().mean(1) / residual.square().mean(1))
