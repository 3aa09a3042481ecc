"""The training loss: one value whatever the parametrisation, input scaling, self-conditioning, one graph."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from diffscale.diffusion import (
    INTERPOLANTS,
    PREDICTIONS,
    SCHEDULES,
    create_diffusion,
    denoise,
    measured_logsnr,
    multiscale_error,
    training_loss,
)
from diffscale.diffusion.interpolants import per_image

from .exact_denoisers import GaussianNet, gaussian, unit_noise

U = (torch.arange(32) + 0.5) / 32
X = (0.5 * unit_noise(32, 3, 16, 16)).clamp(-1, 1)
NOISE = unit_noise(32, 3, 16, 16, seed=1)


@pytest.mark.parametrize("settings", [{}, {"input_scale": 0.5}, {"input_range": "0,1"}, {"multiscale_loss": True}])
def test_the_loss_of_one_denoiser_is_the_same_for_every_prediction_and_interpolant(settings):
    losses = []
    for prediction in PREDICTIONS:
        for interpolant in INTERPOLANTS:
            diffusion, net = gaussian(0.3, prediction=prediction, interpolant=interpolant, **settings)
            terms = training_loss(diffusion, net, X, u=U, noise=NOISE)
            losses.append((terms.loss, terms.logsnr, terms.mse_eps(), terms.mse_x0()))
    for terms in losses[1:]:
        for got, expected in zip(terms, losses[0], strict=True):
            torch.testing.assert_close(got, expected, rtol=3e-3, atol=1e-6)


def test_errors_are_those_of_the_noise_and_of_the_image():
    diffusion, net = gaussian(0.3, prediction="v", input_scale=0.5)
    terms = training_loss(diffusion, net, X, u=U, noise=NOISE)
    x = diffusion.scale_images(X)
    alpha, sigma = (per_image(c, x) for c in diffusion.alpha_sigma(terms.logsnr))
    z = alpha * x + sigma * NOISE
    estimate, _ = denoise(diffusion, net, z, terms.logsnr)
    mse_x0 = (diffusion.unscale_images(estimate) - X).square().flatten(1).mean(1)
    mse_eps = ((z - alpha * estimate) / sigma - NOISE).square().flatten(1).mean(1)
    torch.testing.assert_close(terms.mse_x0(), mse_x0, rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(terms.mse_eps(), mse_eps, rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(
        terms.loss, terms.mse_eps() * (5 / terms.logsnr.exp()).clamp(max=1), rtol=1e-4, atol=1e-7
    )


def test_input_scale_moves_logsnr_by_exactly_2_ln_b():
    # Chen 2023 (arXiv 2301.10972): at scale b the image has SNR b² times that of the plain one
    x, noise = unit_noise(4, 3, 256, 256), unit_noise(4, 3, 256, 256, seed=1)
    levels = torch.zeros(4)
    alpha, sigma = (per_image(c, x) for c in INTERPOLANTS["vp"](levels))
    plain = measured_logsnr(alpha * x + sigma * noise, x)
    scaled = measured_logsnr(alpha * 0.3 * x + sigma * noise, x)
    torch.testing.assert_close(scaled - plain, torch.full((4,), 2 * math.log(0.3)).double(), rtol=0, atol=0.08)


@pytest.mark.parametrize("interpolant", INTERPOLANTS)
@pytest.mark.parametrize(("kind", "std"), [("unit", 1.0), ("data", 0.5)])
def test_normalised_inputs_have_unit_variance_at_every_level(interpolant, kind, std):
    diffusion = create_diffusion(interpolant=interpolant, input_scale=0.4, input_std=kind, sigma_data=0.5)
    logsnr = torch.linspace(-12, 12, 9)
    alpha, sigma = diffusion.alpha_sigma(logsnr)
    x = diffusion.scale_images(std * unit_noise(9, 1, 128, 128))
    z = per_image(alpha, x) * x + per_image(sigma, x) * unit_noise(9, 1, 128, 128, seed=1)
    measured = (z / per_image(diffusion.input_norm(alpha, sigma), z)).flatten(1).std(1)
    torch.testing.assert_close(measured, torch.ones(9), rtol=0, atol=0.02)


def test_unit_normalisation_is_chens_formula():
    diffusion = create_diffusion(interpolant="vp", input_scale=0.3)
    logsnr = torch.linspace(-9, 9, 19, dtype=torch.float64)
    gamma = torch.sigmoid(logsnr)
    expected = ((0.3**2 - 1) * gamma + 1).sqrt()  # Chen 2023 (arXiv 2301.10972): √((b² − 1)γ + 1)
    torch.testing.assert_close(diffusion.input_norm(*diffusion.alpha_sigma(logsnr)), expected)


def test_plain_images_enter_unnormalised_as_published_models_have_them():
    ones = torch.ones(2)
    assert create_diffusion().input_norm(ones, ones) is None
    assert create_diffusion(interpolant="linear").input_norm(ones, ones) is None
    assert create_diffusion(interpolant="ve").input_norm(ones, ones) is not None


@pytest.mark.parametrize("interpolant", INTERPOLANTS)
def test_F_gives_the_network_edms_preconditioned_input(interpolant):
    seen = []

    class Spy(nn.Module):
        def forward(self, x_in, logsnr, label=None, state=None):
            seen.append(x_in)
            return torch.zeros_like(x_in), None

    diffusion = create_diffusion(prediction="F", interpolant=interpolant, weighting={"name": "edm"})
    sigma = torch.tensor([0.01, 1.0, 50.0])
    y = 0.5 * unit_noise(3, 1, 4, 4) + per_image(sigma, NOISE) * unit_noise(3, 1, 4, 4, seed=1)
    logsnr = -2 * sigma.log()
    estimate, _ = denoise(diffusion, Spy(), y * per_image(diffusion.alpha_sigma(logsnr)[0], y), logsnr)
    s = per_image(sigma, y)
    torch.testing.assert_close(seen[0], y / (s**2 + 0.25).sqrt())  # c_in: Karras et al. 2022, table 1
    torch.testing.assert_close(estimate, y * 0.25 / (s**2 + 0.25))  # c_skip


def test_images_survive_scaling_and_back():
    for settings in ({"input_scale": 0.3}, {"input_range": "0,1"}, {"input_range": "0,1", "input_scale": 0.5}):
        diffusion = create_diffusion(**settings)
        scaled = diffusion.scale_images(torch.tensor([-1.0, 1.0]))
        assert scaled.tolist() == pytest.approx(list(diffusion.clip_bounds()))
        assert diffusion.unscale_images(scaled).tolist() == pytest.approx([-1, 1])
    assert create_diffusion(input_range="0,1").clip_bounds() == (0.0, 1.0)


def test_multiscale_error_is_the_papers_sum():
    difference = unit_noise(2, 3, 128, 128)
    expected = sum(
        (nn.functional.avg_pool2d(difference, 128 // s) ** 2).mean((1, 2, 3)) / s for s in (32, 64, 128)
    )  # Hoogeboom et al. 2023 (simple diffusion), section 3.3
    torch.testing.assert_close(multiscale_error(difference), expected)
    with pytest.raises(ValueError, match="resolution 48"):
        multiscale_error(unit_noise(1, 1, 48, 48))


class Carrying(nn.Module):
    """A network whose output shows the state that it was given."""

    carries_state = True

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[torch.Tensor | None] = []
        self.bias = nn.Parameter(torch.zeros(1))

    def forward(self, x_in, logsnr, label=None, state=None):
        self.calls.append(state)
        return x_in + self.bias, torch.full((len(x_in), 2, 3), 7.0) + self.bias


def test_self_conditioning_makes_one_pass_without_gradient_and_drops_the_state_by_sample():
    net = Carrying()
    keep = torch.tensor([True, False] * 16)
    training_loss(create_diffusion(), net, X, u=U, noise=NOISE, self_cond_keep=keep).loss.sum().backward()
    first, second = net.calls
    assert first is None
    assert not second.requires_grad
    assert bool((second[keep] == 7).all())
    assert bool((second[~keep] == 0).all())


class Uncertain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.level = nn.Parameter(torch.tensor(0.7))
        self.net = GaussianNet(create_diffusion(prediction="F", weighting={"name": "edm"}), 0.3)

    def uncertainty(self, logsnr):
        return self.level.expand(len(logsnr))

    def forward(self, *arguments):
        return self.net(*arguments)


def test_learned_uncertainty_divides_the_edm_loss_and_adds_itself():
    model = Uncertain()
    plain = training_loss(model.net.diffusion, model, X, u=U, noise=NOISE).loss
    learned = create_diffusion(prediction="F", weighting={"name": "learned_uncertainty"})
    loss = training_loss(learned, model, X, u=U, noise=NOISE).loss
    torch.testing.assert_close(loss, plain / math.exp(0.7) + 0.7)  # EDM2, eq. 21
    loss.sum().backward()
    torch.testing.assert_close(model.level.grad, (1 - plain / math.exp(0.7)).sum())
    with pytest.raises(ValueError, match="no `uncertainty` head"):
        training_loss(learned, model.net, X, u=U, noise=NOISE)


class Small(nn.Module):
    carries_state = True

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.line = nn.Conv2d(3, 3, 3, padding=1), nn.Linear(1, 3)

    def uncertainty(self, logsnr):
        return 0.1 * logsnr

    def forward(self, x_in, logsnr, label=None, state=None):
        h = self.conv(x_in) + per_image(logsnr, x_in) * self.line.bias[:, None, None]
        if state is not None:
            h = h + per_image(state.mean((1, 2)), h)
        return h, h.flatten(2)


@pytest.mark.parametrize(
    ("schedule", "weighting"),
    [
        *((name, "sigmoid") for name in SCHEDULES),
        ("flow_uniform", "learned_uncertainty"),
        ("flow_uniform", "min_snr"),
    ],
)
def test_the_loss_is_one_graph_with_the_network(schedule, weighting):
    settings = {"noise_resolution": 64, "noise_resolution_low": 32} if schedule == "simple_cosine" else {}
    diffusion = create_diffusion(
        schedule={"name": schedule, **settings},
        weighting={"name": weighting},
        prediction="F" if weighting == "learned_uncertainty" else "v",
        resolution=64,
        multiscale_loss=True,
    )
    model = Small()

    def step(x, u, noise, keep):
        return training_loss(diffusion, model, x, u=u, noise=noise, self_cond_keep=keep)

    keep = torch.rand(32) > 0.1
    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend="eager")(X, U, NOISE, keep)
    for got, expected in zip(compiled, step(X, U, NOISE, keep), strict=True):
        torch.testing.assert_close(got, expected)
    compiled.loss.sum().backward()


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_the_denoiser_is_one_graph_with_the_network(prediction):
    diffusion = create_diffusion(prediction=prediction, interpolant="linear", input_scale=0.5)
    model = Small()

    def step(z, logsnr, state):
        return denoise(diffusion, model, z, logsnr, None, state)

    torch._dynamo.reset()
    arguments = (NOISE, 4 * U, torch.ones(32, 3, 4))
    got = torch.compile(step, fullgraph=True, backend="eager")(*arguments)
    torch.testing.assert_close(got, step(*arguments))
