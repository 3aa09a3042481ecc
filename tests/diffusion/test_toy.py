"""A small network trained on a 2-D distribution draws that distribution, whichever prediction it is trained with."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from torch import nn

from diffscale.core.keyed_random import Stream, normal, stratified_uniform
from diffscale.diffusion import PREDICTIONS, SOLVERS, create_diffusion, sample, training_loss

SHARES = torch.tensor([0.10, 0.15, 0.20, 0.25, 0.30])
STEPS, BATCH, DRAWN = 1500, 256, 3000


def five_blobs(count: int, seed: int) -> torch.Tensor:
    """(count, 2): five narrow Gaussians on a circle, of unequal shares."""
    generator = torch.Generator().manual_seed(seed)
    blob = torch.multinomial(SHARES, count, replacement=True, generator=generator)
    angle = blob * (2 * math.pi / 5)
    centre = 0.7 * torch.stack([angle.cos(), angle.sin()], dim=1)
    return centre + 0.08 * torch.randn(count, 2, generator=generator)


def nearest_blob_shares(points: torch.Tensor) -> torch.Tensor:
    blob = (torch.atan2(points[:, 1], points[:, 0]) / (2 * math.pi / 5)).round().long() % 5
    return torch.bincount(blob, minlength=5) / len(points)


def energy_distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """0 for equal distributions (Székely and Rizzo 2013); the bias of finite samples included."""
    return float(2 * torch.cdist(a, b).mean() - torch.cdist(a, a).mean() - torch.cdist(b, b).mean())


class Net(nn.Module):
    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.frequencies = 0.05 * 2 ** torch.arange(6)
        sizes = [2 + 12, width, width, width]
        layers = [m for a, b in pairwise(sizes) for m in (nn.Linear(a, b), nn.SiLU())]
        self.layers = nn.Sequential(*layers, nn.Linear(width, 2))

    def forward(self, x_in, logsnr, label=None, state=None):
        phase = logsnr[:, None] * self.frequencies
        return self.layers(torch.cat([x_in, phase.sin(), phase.cos()], dim=1)), None


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_a_trained_network_draws_its_data(prediction):
    torch.manual_seed(0)
    diffusion = create_diffusion(
        schedule={"name": "simple_cosine", "logsnr_min": -6.0, "logsnr_max": 8.0},
        prediction=prediction,
        weighting={"name": "min_snr", "gamma": 20.0},
    )
    net = Net()
    optimizer = torch.optim.Adam(net.parameters(), 1e-2, betas=(0.9, 0.99))
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    data = five_blobs(STEPS * BATCH, 0).reshape(STEPS, BATCH, 2)
    noise = normal(0, Stream.NOISE, torch.arange(STEPS * BATCH), (2,)).reshape(STEPS, BATCH, 2)
    levels = stratified_uniform(0, torch.arange(STEPS * BATCH), BATCH).reshape(STEPS, BATCH)
    for x, eps, u in zip(data, noise, levels, strict=True):
        training_loss(diffusion, net, x, u=u, noise=eps).loss.mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        decay.step()

    solver = SOLVERS["dpmpp_2m"](steps=25, grid="uniform_logsnr", clip="none")
    drawn = sample(diffusion, net, normal(1, Stream.SAMPLE_NOISE, torch.arange(DRAWN), (2,)), solver=solver)
    truth = five_blobs(DRAWN, 1)
    gaussian = truth.mean(0) + truth.std(0) * torch.randn(DRAWN, 2)
    assert energy_distance(gaussian, truth) > 0.03  # what the data's moments alone would give
    assert energy_distance(drawn, truth) < 0.006  # two draws of the data: up to 0.0013
    torch.testing.assert_close(nearest_blob_shares(drawn), SHARES, rtol=0, atol=0.06)
