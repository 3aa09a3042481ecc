"""Draws, loss and denoiser compile as one graph with every backbone: `fullgraph=True` raises at a graph break."""

from __future__ import annotations

import pytest
import torch

from diffscale.core.keyed_random import Stream, normal, stratified_uniform, uniform
from diffscale.diffusion import create_diffusion, denoise, training_loss
from diffscale.kernels.noise import draw_normal
from diffscale.models import MODELS, create_model

FAST = ("unet", "rin")  # the others trace for as long again; rin is the one that carries state


@pytest.mark.parametrize("name", [n if n in FAST else pytest.param(n, marks=pytest.mark.slow) for n in MODELS])
def test_the_loss_and_the_denoiser_are_one_graph_with_every_backbone(name):
    model = create_model(f"{name}-tiny", resolution=32, num_classes=3)
    diffusion = create_diffusion(
        prediction="F" if name == "edm2" else "v",
        weighting={"name": "learned_uncertainty" if name == "edm2" else "sigmoid"},
    )
    positions = torch.arange(2)
    x, noise = (normal(seed, Stream.NOISE, positions, (3, 32, 32)) for seed in (0, 1))
    label = torch.tensor([0, 3])

    def loss(x, positions, label):
        u, keep = stratified_uniform(0, positions, 2), uniform(0, Stream.SELF_COND, positions) < 0.9
        drawn = draw_normal(1, int(Stream.NOISE), positions, (3, 32, 32))
        return training_loss(diffusion, model, x, u=u, noise=drawn, label=label, self_cond_keep=keep)

    def estimate(z, logsnr, label):
        return denoise(diffusion, model, z, logsnr, label)

    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="eager")(x, positions, label)
    compiled.loss.sum().backward()
    assert bool(compiled.loss.isfinite().all())
    model.eval()
    with torch.no_grad():
        arguments = (noise, torch.tensor([-1.0, 2.0]), label)
        got, _ = torch.compile(estimate, fullgraph=True, backend="eager")(*arguments)
        torch.testing.assert_close(got, estimate(*arguments)[0])


def test_a_learned_variance_on_numbered_steps_is_one_graph_with_its_network():
    torch.manual_seed(0)
    settings = {"model_channels": 16, "channel_mult": (1,), "num_blocks": 1, "attn_resolutions": ()}
    model = create_model("unet", resolution=8, out_channels=6, noise_input="ddpm_index", **settings)
    diffusion = create_diffusion(
        schedule={"name": "ddpm_linear"},
        prediction="eps",
        weighting={"name": "uniform_eps"},
        discrete=True,
        variance="learned_range",
    )

    def loss(x, u, noise):
        return training_loss(diffusion, model, x, u=u, noise=noise).loss

    positions = torch.arange(2)
    x, noise = (normal(seed, Stream.NOISE, positions, (3, 8, 8)) for seed in (0, 1))
    arguments = (x, torch.tensor([0.0, 0.7]), noise)
    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="eager")(*arguments)
    torch.testing.assert_close(compiled, loss(*arguments))
