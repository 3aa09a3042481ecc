"""The exchange study: what a square gains from the others, and the loss that training knows."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from benchmarks.studies.exchange import MEASURED, chequerboard, exchange
from diffscale.core.keyed_random import Stream, normal
from diffscale.diffusion import training_loss
from diffscale.models import create_model

POSITIONS = torch.arange(16)


class EachPixelAlone(nn.Module):
    def forward(self, x_in: Tensor, logsnr: Tensor, label: Tensor | None = None, state: Tensor | None = None):
        return 0.3 * x_in, None


class MeanOfTheImage(nn.Module):
    def forward(self, x_in: Tensor, logsnr: Tensor, label: Tensor | None = None, state: Tensor | None = None):
        return x_in.mean((2, 3), keepdim=True).expand_as(x_in), None


def images() -> Tensor:
    """Grey images, each of its own grey."""
    return torch.linspace(-1, 1, 16)[:, None, None, None].expand(16, 3, 32, 32).contiguous()


def test_a_network_that_looks_at_each_square_alone_has_no_exchange() -> None:
    found = exchange(MEASURED, EachPixelAlone(), images(), POSITIONS)
    torch.testing.assert_close(found.own, found.other)


def test_a_network_that_looks_at_the_whole_image_loses_by_foreign_squares() -> None:
    found = exchange(MEASURED, MeanOfTheImage(), images(), POSITIONS)
    assert (found.other - found.own).abs().mean() > 0.1


def test_the_loss_is_that_of_training() -> None:
    torch.manual_seed(0)
    model = create_model("rin-small-32", zero_output=False).eval()
    x = torch.rand(16, 3, 32, 32) * 2 - 1
    u = ((POSITIONS * 0.6180339887498949) % 1).float().clamp(1e-4, 1 - 1e-4)
    noise = normal(0, Stream.VALIDATION, POSITIONS, (3, 32, 32))
    with torch.no_grad():
        expected = training_loss(MEASURED, model, x, u=u, noise=noise).loss
    torch.testing.assert_close(exchange(MEASURED, model, x, POSITIONS).own, expected, rtol=1e-4, atol=1e-5)


def test_squares_of_a_chequerboard() -> None:
    board = chequerboard(4, 4, 2).int().tolist()
    assert board == [[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 1], [0, 0, 1, 1]]
