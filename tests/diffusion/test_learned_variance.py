"""The learned variance and its bound against the formulas of Ho et al. 2020 and Nichol and Dhariwal 2021."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.stats import norm
from torch import nn
from torch.distributions import Normal, kl_divergence

from diffscale.diffusion import (
    SCHEDULES,
    SOLVERS,
    Guidance,
    alpha_bars,
    create_diffusion,
    keyed_noise,
    sample,
    training_loss,
)
from diffscale.diffusion.learned_variance import (
    bound_terms,
    discretised_log_likelihood,
    gaussian_kl,
    levels_at,
    log_variances,
)

SHAPE = (3, 4, 4)


def process(schedule: str = "ddpm_linear", steps: int = 20, **settings):
    chosen = {"name": schedule, "steps": steps}
    given = {"prediction": "eps", "weighting": {"name": "uniform_eps"}, "discrete": True, "variance": "learned_range"}
    return create_diffusion(schedule=chosen, **given | settings)


class Constant(nn.Module):
    """A network with constants for eps and for the variance's channels, of one value for each class."""

    def __init__(self, eps: float = 0.0, v: float | tuple[float, ...] = 0.0) -> None:
        super().__init__()
        self.eps = nn.Parameter(torch.tensor(eps))
        self.v = nn.Parameter(torch.tensor(v))
        self.num_classes = self.v.numel()

    def forward(self, x, logsnr, label=None, state=None):
        v = self.v.expand(self.num_classes)[0 if label is None else label].reshape(-1, 1, 1, 1)
        return torch.cat([self.eps.expand(x.shape), v.expand(x.shape)], dim=1), None


@pytest.mark.parametrize("schedule", ["ddpm_linear", "iddpm_cosine"])
def test_the_range_goes_from_the_posteriors_variance_to_that_of_the_forward_step(schedule):
    chosen = SCHEDULES[schedule](steps=1000)
    betas = chosen.betas()
    bars = alpha_bars(betas)
    small = betas[1:] * (1 - bars[:-1]) / (1 - bars[1:])  # Ho et al. 2020, eq. 7
    index = torch.arange(1, 1000)
    log_small, gap = log_variances(levels_at(chosen, index), levels_at(chosen, index - 1))
    in_y = bars[:-1].log()  # of z_s = sqrt(ᾱ_s)·y
    torch.testing.assert_close(log_small + in_y, small.log(), rtol=0, atol=1e-7)
    torch.testing.assert_close(log_small + gap + in_y, betas[1:].log(), rtol=0, atol=1e-7)


def test_the_divergence_of_two_gaussians_is_that_of_torch():
    means, log_variance, other = torch.randn(2, 50), torch.randn(50), torch.randn(50)
    expected = kl_divergence(Normal(means[0], (log_variance / 2).exp()), Normal(means[1], (other / 2).exp()))
    torch.testing.assert_close(gaussian_kl((means[0] - means[1]).square(), log_variance, other), expected)


@pytest.mark.parametrize(("mean", "std"), [(0.1, 0.01), (-0.98, 0.05), (1.2, 0.3)])
def test_the_bins_of_8_bit_values_hold_the_whole_probability(mean, std):
    grey = torch.arange(256, dtype=torch.float64) / 127.5 - 1
    log_std = torch.tensor(math.log(std), dtype=torch.float64)
    found = discretised_log_likelihood(grey, torch.tensor(mean, dtype=torch.float64), log_std).exp()
    edges = np.concatenate([[-np.inf], (np.arange(1, 256) - 0.5) / 127.5 - 1, [np.inf]])
    expected = np.diff(norm.cdf(edges, mean, std))  # Ho et al. 2020, eq. 13
    np.testing.assert_allclose(found.numpy(), np.maximum(expected, 1e-12), atol=1e-9)
    assert float(found.sum()) == pytest.approx(1, abs=1e-9)


@pytest.mark.parametrize("gain", [1.0, 0.5])
@pytest.mark.parametrize("schedule", ["ddpm_linear", "iddpm_cosine"])
def test_the_terms_of_the_bound_are_those_of_the_papers(schedule, gain):
    """Posterior and model of each step in z, by eqs. 6, 7, 11 and 13 of Ho et al. and eq. 15 of Nichol and Dhariwal."""
    chosen = SCHEDULES[schedule](steps=20)
    betas = chosen.betas()
    bars = alpha_bars(betas)
    torch.manual_seed(0)
    image, estimate = (torch.rand(20, *SHAPE, dtype=torch.float64) * 2 - 1 for _ in range(2))
    share = torch.rand(20, *SHAPE, dtype=torch.float64)
    expected = []
    for i in range(20):
        if i == 0:
            low = betas[1] * (1 - bars[0]) / (1 - bars[1])  # β̃ of step 0 is 0: the authors take that of step 1
            std = (0.5 * (share[0] * betas[0].log() + (1 - share[0]) * low.log())).exp() / gain
            grey = image[0]
            upper = torch.where(grey > 0.999, math.inf, grey + 1 / 255)
            lower = torch.where(grey < -0.999, -math.inf, grey - 1 / 255)
            p = norm.cdf(upper.numpy(), estimate[0].numpy(), std) - norm.cdf(lower.numpy(), estimate[0].numpy(), std)
            expected.append(-np.log2(np.maximum(p, 1e-12)).mean())
            continue
        small = betas[i] * (1 - bars[i - 1]) / (1 - bars[i])
        factor = bars[i - 1].sqrt() * betas[i] / (1 - bars[i])
        variance = (share[i] * betas[i].log() + (1 - share[i]) * small.log()).exp()
        q = Normal(factor * image[i] * gain, small.sqrt())
        p = Normal(factor * estimate[i] * gain, variance.sqrt())
        expected.append(float(kl_divergence(q, p).mean()) / math.log(2))
    found = bound_terms(chosen, torch.arange(20), share, image=image, estimate=estimate, image_gain=gain)
    torch.testing.assert_close(found.double(), torch.tensor(expected, dtype=torch.float64), rtol=1e-4, atol=1e-6)


def test_the_hybrid_loss_is_the_simple_one_plus_a_thousandth_of_the_bound_which_leaves_the_mean_alone():
    diffusion, simple = (
        process(steps=50),
        create_diffusion(
            schedule={"name": "ddpm_linear", "steps": 50},
            prediction="eps",
            weighting={"name": "uniform_eps"},
            discrete=True,
        ),
    )
    u, x, noise = torch.rand(64), torch.rand(64, *SHAPE) * 2 - 1, torch.randn(64, *SHAPE)
    net = Constant(0.3, 0.2)
    hybrid = training_loss(diffusion, net, x, u=u, noise=noise)
    mse = (0.3 - noise).square().flatten(1).mean(1)
    index = (u * 50).long()
    torch.testing.assert_close(diffusion.training_step(u), index)
    bars = alpha_bars(diffusion.schedule.betas())[index].float().reshape(-1, 1, 1, 1)
    estimate = x + ((1 - bars) / bars).sqrt() * (noise - 0.3)
    share = torch.full_like(x, 0.6)
    bound = bound_terms(diffusion.schedule, index, share, image=x, estimate=estimate, image_gain=1.0)
    torch.testing.assert_close(hybrid.loss, mse + 0.001 * 50 * bound, rtol=1e-4, atol=1e-5)

    class Half(nn.Module):
        def forward(self, *inputs):
            return net(*inputs)[0].chunk(2, dim=1)[0], None

    plain = training_loss(simple, Half(), x, u=u, noise=noise)
    (of_hybrid,) = torch.autograd.grad(hybrid.loss.sum(), net.eps, retain_graph=True)
    (of_simple,) = torch.autograd.grad(plain.loss.sum(), net.eps)
    torch.testing.assert_close(of_hybrid, of_simple)
    (of_variance,) = torch.autograd.grad(hybrid.loss.sum(), net.v)
    assert torch.isfinite(of_variance)
    assert float(of_variance) != 0


@pytest.mark.parametrize(("v", "variance"), [(-1.0, "small"), (1.0, "large"), (2 * 0.3 - 1, "mix")])
def test_constant_outputs_of_the_range_are_the_fixed_variances(v, variance):
    diffusion, noise = process(), torch.randn(2, *SHAPE)
    images = [
        sample(
            diffusion,
            Constant(0.1, v),
            noise,
            solver=SOLVERS["ddpm"](steps=10, grid="respaced", variance=kind),
            noise_fn=keyed_noise(0, torch.arange(2), SHAPE),
        )
        for kind in ("learned", variance)
    ]
    torch.testing.assert_close(*images, rtol=1e-5, atol=1e-5)


def test_guidance_moves_the_mean_and_leaves_the_variance_of_the_label():
    """DiT's code: the variance's channels are those of the conditional half."""
    noise, noise_fn = torch.randn(2, *SHAPE), keyed_noise(0, torch.arange(2), SHAPE)
    solver = SOLVERS["ddpm"](steps=10, grid="respaced", variance="learned")
    labels = torch.ones(2, dtype=torch.int64)
    guided = sample(
        process(), Constant(0.1, (-1.0, 0.5)), noise, solver=solver, label=labels, guidance=Guidance(3.0),
        noise_fn=noise_fn,
    )  # fmt: skip
    plain = sample(process(), Constant(0.1, 0.5), noise, solver=solver, noise_fn=noise_fn)
    torch.testing.assert_close(guided, plain)  # the prediction is the same with and without the label


@pytest.mark.parametrize(("count", "first"), [(250, [0, 4, 8, 12]), (1000, [0, 1, 2, 3]), (100, [0, 10, 20, 30])])
def test_respaced_steps_are_those_of_improved_diffusion(count, first):
    """space_timesteps(1000, [count]): round(i·(T − 1)/(count − 1)), from the first step to the last."""
    schedule = SCHEDULES["ddpm_linear"]()
    levels = SOLVERS["ddpm"](steps=count, grid="respaced").logsnr_grid(schedule)
    numbers = (schedule.t(torch.tensor(levels, dtype=torch.float64)) * 999).flip(0)
    expected = torch.tensor([round(i * 999 / (count - 1)) for i in range(count)], dtype=torch.float64)
    assert expected[:4].tolist() == first
    torch.testing.assert_close(numbers, expected, rtol=0, atol=1e-6)


def test_what_the_schedule_or_the_network_lacks_is_refused():
    with pytest.raises(ValueError, match="set discrete = true"):
        process(discrete=False)
    with pytest.raises(ValueError, match="ddpm_linear, iddpm_cosine have them"):
        create_diffusion(discrete=True)
    fixed = process(variance="fixed")
    for solver, message in (
        (SOLVERS["ddpm"](steps=5, variance="learned"), "the process has none"),
        (SOLVERS["ddpm"](steps=21, grid="respaced"), "20 numbered steps"),
    ):
        with pytest.raises(ValueError, match=message):
            sample(fixed, Constant(), torch.zeros(1, *SHAPE), solver=solver, noise_fn=lambda step: torch.zeros(1))
