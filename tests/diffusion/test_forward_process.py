"""Corruption as tutorials write it: mixing, its discrete form, DDPM's chain, the signal-to-noise ratio of images."""

from __future__ import annotations

import torch

from diffscale.diffusion import (
    INTERPOLANTS,
    add_noise,
    alpha_bars,
    linear_betas,
    measured_logsnr,
    mix,
    q_sample,
    q_sample_step,
)

from .exact_denoisers import unit_noise


def test_corrupt_mixes_linearly_from_the_image_to_the_noise():
    x, noise = unit_noise(3, 1, 4, 4), unit_noise(3, 1, 4, 4, seed=1)
    mixed = mix(x, noise, torch.tensor([0.0, 0.25, 1.0]))
    assert torch.equal(mixed[0], x[0])
    torch.testing.assert_close(mixed[1], 0.75 * x[1] + 0.25 * noise[1])
    assert torch.equal(mixed[2], noise[2])


def test_corrupt_is_the_linear_interpolant():
    x, noise = unit_noise(9, 1, 4, 4), unit_noise(9, 1, 4, 4, seed=1)
    amount = torch.linspace(0.1, 0.9, 9)
    alpha, sigma = INTERPOLANTS["linear"](2 * torch.log((1 - amount) / amount))
    z = alpha[:, None, None, None] * x + sigma[:, None, None, None] * noise
    torch.testing.assert_close(mix(x, noise, amount), z)


def test_add_noise_is_corrupt_by_the_share_of_timesteps():
    x, noise = unit_noise(3, 1, 4, 4), unit_noise(3, 1, 4, 4, seed=1)
    steps = torch.tensor([0, 250, 1000])
    assert torch.equal(add_noise(x, noise, steps), mix(x, noise, steps / 1000))


def test_the_jump_is_the_chain_in_distribution():
    # Variance of both, by the recursion Var_t = (1−β)Var_{t−1} + β, and the mean's factor
    betas = linear_betas()[:300]
    factor, variance = 1.0, 0.0
    for beta in betas.tolist():
        factor, variance = factor * (1 - beta) ** 0.5, (1 - beta) * variance + beta
    bar = alpha_bars(betas)[-1]
    torch.testing.assert_close(bar.sqrt(), torch.tensor(factor).double())
    torch.testing.assert_close(1 - bar, torch.tensor(variance).double())


def test_a_chain_of_steps_ends_where_the_jump_does():
    betas = linear_betas()[:40]
    x = torch.full((4000, 1), 2.0, dtype=torch.float64)
    chain = x
    for i, beta in enumerate(betas):
        chain = q_sample_step(chain, unit_noise(4000, 1, seed=i, dtype=torch.float64), beta.expand(4000))
    bar = alpha_bars(betas)[-1].expand(4000)
    jump = q_sample(x, unit_noise(4000, 1, seed=99, dtype=torch.float64), bar)
    assert abs(chain.mean() - jump.mean()) < 5 * (2 * (1 - bar[0]) / 4000) ** 0.5
    assert abs(chain.var() / jump.var() - 1) < 0.12


def test_inputs_in_0_1_have_a_quarter_of_the_signal():
    x, noise = unit_noise(8, 3, 64, 64).clamp(-1, 1), unit_noise(8, 3, 64, 64, seed=1)
    bar = torch.full((8,), 0.5)
    difference = measured_logsnr(q_sample(x, noise, bar), x) - measured_logsnr(q_sample((x + 1) / 2, noise, bar), x)
    torch.testing.assert_close(difference, torch.full((8,), 4.0).log().double(), rtol=0, atol=0.1)


def test_measured_logsnr_is_the_interpolants_for_unit_variance():
    x, noise = unit_noise(8, 3, 64, 64), unit_noise(8, 3, 64, 64, seed=1)
    for interpolant in INTERPOLANTS.values():
        alpha, sigma = interpolant(torch.tensor(-0.8))
        torch.testing.assert_close(
            measured_logsnr(alpha * x + sigma * noise, x), torch.full((8,), -0.8).double(), rtol=0, atol=0.13
        )
