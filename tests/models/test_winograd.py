"""Winograd's convolution is the direct one up to rounding, forward and backward, at any size and in any slices."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F

from diffscale.models import create_model, winograd
from diffscale.models.winograd import Conv3x3, Winograd, suits
from diffscale.native import library

needs_kernel = pytest.mark.skipif(library("models/winograd") is None, reason="no C++ compiler on this machine")
SHAPES = [(2, 16, 24, 8, 8), (3, 32, 8, 13, 6), (1, 40, 72, 4, 5), (5, 8, 8, 7, 16)]  # B, C, K, H, W


def data(b: int, c: int, k: int, h: int, w: int) -> list[torch.Tensor]:
    """Images, filters of unit gain, shifts, residuals and an upstream gradient, float64."""
    generator = torch.Generator().manual_seed(b * c + h)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    return [draw(b, c, h, w), draw(k, c, 3, 3) / (9 * c) ** 0.5, draw(b, k), draw(b, k, h, w), draw(b, k, h, w)]


def results(convolve, inputs: list[torch.Tensor], upstream: torch.Tensor) -> list[torch.Tensor]:
    """The output and the gradients of all inputs."""
    leaves = [t.clone().requires_grad_() for t in inputs]
    y = convolve(*leaves)
    y.backward(upstream)
    return [y.detach(), *(leaf.grad for leaf in leaves)]


@needs_kernel
@pytest.mark.parametrize("shape", SHAPES)
def test_output_and_gradients_are_those_of_the_direct_convolution(shape):
    *inputs, upstream = data(*shape)
    exact = results(lambda x, w, s, r: F.conv2d(x, w, padding=1) + s[:, :, None, None] + r, inputs, upstream)
    fast = results(Winograd.apply, [t.float() for t in inputs], upstream.float())
    for a, b in zip(fast, exact, strict=True):
        assert (a - b).abs().max() < 1e-5 * b.abs().max()  # measured: 6e-6 at most


@needs_kernel
def test_threads_change_no_bit_and_any_part_may_be_left_out():
    x, weight, shift, residual, upstream = (t.float() for t in data(5, 32, 40, 12, 12))
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(results(Winograd.apply, [x, weight, shift, residual], upstream))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))
    for with_shift, with_residual in ((True, False), (False, True), (False, False)):
        parts = shift if with_shift else None, residual if with_residual else None
        whole = Winograd.apply(x, weight, *parts)
        missing = (0 if with_shift else shift[:, :, None, None]) + (0 if with_residual else residual)
        assert torch.allclose(whole + missing, found[0][0], atol=1e-5)


@needs_kernel
def test_only_what_the_kernels_take_goes_to_them():
    layer = Conv3x3(16, 16)
    image = torch.randn(2, 16, 8, 8)
    assert suits(image, layer.weight)
    assert not suits(image.bfloat16(), layer.weight)
    assert not suits(image.double(), layer.weight.double())
    assert not suits(torch.randn(2, 12, 8, 8), torch.randn(16, 12, 3, 3))
    assert not suits(torch.randn(2, 16, 2, 2), layer.weight)
    assert not suits(image.to("meta"), layer.weight.to("meta"))
    with torch.autocast("cpu", torch.bfloat16):
        assert not suits(image, layer.weight)


@needs_kernel
@pytest.mark.parametrize("name", ["unet-tiny", "uvit-tiny", "edm2-tiny"])
def test_a_network_gives_the_same_with_it_and_keeps_its_names(name):
    torch.manual_seed(0)
    model = create_model(name, resolution=16)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    x, logsnr, outputs, gradients = torch.randn(2, 3, 16, 16), torch.zeros(2), [], []
    model.eval()
    for enabled in (False, True):
        winograd.use_winograd(model, enabled)
        model.zero_grad()
        outputs.append(model(x, logsnr)[0])
        outputs[-1].square().mean().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    assert not torch.equal(*outputs)
    assert (outputs[0] - outputs[1]).abs().max() < 1e-4 * outputs[0].abs().max()
    assert (gradients[0] - gradients[1]).norm() < 1e-4 * gradients[0].norm()


@needs_kernel
def test_the_kept_filters_follow_the_weights():
    layer, image = Conv3x3(16, 16), torch.randn(2, 16, 8, 8)
    layer.winograd = True
    for change in (
        lambda: None,
        lambda: layer.weight.mul_(2),
        lambda: layer.load_state_dict(Conv3x3(16, 16).state_dict()),
    ):
        with torch.no_grad():
            change()
            kept = layer(image)
        assert torch.equal(kept, layer(image))  # with gradients: transformed anew
    assert copy.deepcopy(layer)._filters is None
