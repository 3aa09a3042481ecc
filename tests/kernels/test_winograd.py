"""Winograd's convolution is the direct one up to rounding, forward and backward, at any size and in any slices."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F

from diffscale.kernels import winograd
from diffscale.kernels.winograd import BFLOAT16, FLOAT32, Conv3x3, Winograd, suitable
from diffscale.models import create_model

needs_kernel = pytest.mark.skipif(not FLOAT32.available, reason="no C++ compiler on this machine")
needs_bfloat16 = pytest.mark.skipif(not BFLOAT16.available, reason="no compiler, or no products of bfloat16 here")
EACH = [
    pytest.param(FLOAT32, id="float32", marks=needs_kernel),
    pytest.param(BFLOAT16, id="bfloat16", marks=needs_bfloat16),
]
SHAPES = [(2, 16, 24, 8, 8), (3, 32, 8, 13, 6), (1, 40, 72, 4, 5), (5, 8, 8, 7, 16)]  # B, C, K, H, W
EVEN_SHAPES = [(2, 16, 48, 8, 8), (3, 32, 16, 14, 6), (1, 80, 64, 2, 2), (5, 64, 32, 6, 16), (1, 16, 16, 6, 2)]


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


@needs_bfloat16
@pytest.mark.parametrize("shape", EVEN_SHAPES)
def test_bfloat16_rounds_about_twice_as_much_as_the_direct_convolution(shape):
    x, weight, shift, residual, upstream = data(*shape)
    x, residual, upstream = (t.bfloat16().double() for t in (x, residual, upstream))
    inputs = [x, weight, shift, residual]
    exact = results(lambda x, w, s, r: F.conv2d(x, w, padding=1) + s[:, :, None, None] + r, inputs, upstream)
    fast = results(
        Winograd.apply, [x.bfloat16(), weight.float(), shift.float(), residual.bfloat16()], upstream.bfloat16()
    )
    assert [t.dtype for t in fast] == [torch.bfloat16] * 2 + [torch.float32] * 2 + [torch.bfloat16]
    for a, b in zip(fast, exact, strict=True):
        assert (a - b).norm() < 0.006 * b.norm()  # measured: 0.0045 at most, 0.0025 by direct convolution


@pytest.mark.parametrize("kernels", EACH)
def test_threads_change_no_bit_and_any_part_may_be_left_out(kernels):
    x, weight, shift, residual, upstream = (t.float() for t in data(5, 32, 32 + kernels.lanes, 12, 12))
    x, residual, upstream = (t.to(kernels.dtype) for t in (x, residual, upstream))
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
        assert (whole + missing - found[0][0]).norm() < torch.finfo(x.dtype).eps * found[0][0].norm()
        assert kernels is BFLOAT16 or torch.allclose(whole + missing, found[0][0], atol=1e-5)


@needs_kernel
def test_only_what_the_kernels_take_goes_to_them():
    layer = Conv3x3(16, 16)
    image = torch.randn(2, 16, 8, 8)
    low = BFLOAT16 if BFLOAT16.available else None
    assert suitable(image, layer.weight) is FLOAT32
    assert suitable(image.bfloat16(), layer.weight) is None  # torch would refuse it
    assert suitable(image.double(), layer.weight.double()) is None
    assert suitable(torch.randn(2, 12, 8, 8), torch.randn(16, 12, 3, 3)) is None
    assert suitable(torch.randn(2, 16, 2, 2), layer.weight) is None
    assert suitable(image.to("meta"), layer.weight.to("meta")) is None
    with torch.autocast("cpu", torch.bfloat16):
        assert suitable(image, layer.weight) is low
        assert suitable(image.bfloat16(), layer.weight) is low
        assert suitable(image[:, :, 1:], layer.weight) is None  # odd sizes
        assert suitable(torch.randn(2, 24, 8, 8), torch.randn(16, 24, 3, 3)) is None
    with torch.autocast("cpu", torch.float16):
        assert suitable(image, layer.weight) is None


@needs_bfloat16
def test_a_residual_in_float32_stays_in_float32():
    torch.manual_seed(0)
    layer, image, residual = Conv3x3(16, 16), torch.randn(2, 16, 8, 8), torch.randn(2, 16, 8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        for layer.winograd in (False, True):
            y = layer(image, residual=residual)
            with torch.no_grad():
                assert torch.equal(layer(image, residual=residual), y)
            assert (y.dtype, layer(image).dtype) == (torch.float32, torch.bfloat16)


@pytest.mark.parametrize("kernels", EACH)
@pytest.mark.parametrize("name", ["unet-tiny", "uvit-tiny", "edm2-tiny"])
def test_a_network_gives_the_same_with_it(name, kernels):
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
        with torch.autocast("cpu", torch.bfloat16, enabled=kernels is BFLOAT16):
            outputs.append(model(x, logsnr)[0])
        outputs[-1].square().mean().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    assert not torch.equal(*outputs)
    tolerance = 1e-4 if kernels is FLOAT32 else 0.05
    assert (outputs[0] - outputs[1]).abs().max() < tolerance * outputs[0].abs().max()
    assert (gradients[0] - gradients[1]).norm() < tolerance * gradients[0].norm()


@pytest.mark.parametrize("kernels", EACH)
def test_compiled_it_is_one_graph_of_the_same_products(kernels):
    """fullgraph=True raises at a graph break; `aot_eager` runs the traced operations as they are."""
    torch.manual_seed(0)
    layer, image = Conv3x3(16, 32), torch.randn(2, 16, 8, 8)
    shift, residual = torch.randn(2, 32, requires_grad=True), torch.randn(2, 32, 8, 8, requires_grad=True)
    layer.winograd = True
    compiled, found = torch.compile(layer, fullgraph=True, backend="aot_eager"), []
    for run in (layer, compiled):
        leaves = [
            image.clone().requires_grad_(),
            *(t.detach().to(kernels.dtype).requires_grad_() for t in (shift, residual)),
        ]
        with torch.autocast("cpu", torch.bfloat16, enabled=kernels is BFLOAT16):
            y = run(*leaves)
        y.square().sum().backward()
        found.append([y, *(leaf.grad for leaf in leaves), layer.weight.grad, layer.bias.grad])
        layer.zero_grad()
    assert found[0][0].dtype == kernels.dtype
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


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
