"""Winograd's convolution is the direct one up to rounding, forward and backward, at any size and in any slices."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from diffscale.kernels.winograd import BFLOAT16, FLOAT32, Winograd, conv3x3, suitable

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
    weight, image = torch.randn(16, 16, 3, 3), torch.randn(2, 16, 8, 8)
    low = BFLOAT16 if BFLOAT16.available else None
    assert suitable(image, weight) is FLOAT32
    assert suitable(image.bfloat16(), weight) is None  # torch would refuse it
    assert suitable(image.double(), weight.double()) is None
    assert suitable(torch.randn(2, 12, 8, 8), torch.randn(16, 12, 3, 3)) is None
    assert suitable(torch.randn(2, 16, 2, 2), weight) is None
    assert suitable(image.to("meta"), weight.to("meta")) is None
    with torch.autocast("cpu", torch.bfloat16):
        assert suitable(image, weight) is low
        assert suitable(image.bfloat16(), weight) is low
        assert suitable(image[:, :, 1:], weight) is None  # odd sizes
        assert suitable(torch.randn(2, 24, 8, 8), torch.randn(16, 24, 3, 3)) is None
    with torch.autocast("cpu", torch.float16):
        assert suitable(image, weight) is None


@needs_bfloat16
def test_a_residual_in_float32_stays_in_float32():
    torch.manual_seed(0)
    weight, image, residual = torch.randn(16, 16, 3, 3), torch.randn(2, 16, 8, 8), torch.randn(2, 16, 8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        assert conv3x3(image, weight, None, residual=residual).dtype == torch.float32
        assert conv3x3(image, weight, None).dtype == torch.bfloat16


@pytest.mark.parametrize("kernels", EACH)
def test_compiled_it_is_one_graph_of_the_same_products(kernels):
    """fullgraph=True raises at a graph break; `aot_eager` runs the traced operations without change."""
    torch.manual_seed(0)
    image, weight, bias = torch.randn(2, 16, 8, 8), torch.randn(32, 16, 3, 3), torch.randn(32)
    shift, residual = torch.randn(2, 32).to(kernels.dtype), torch.randn(2, 32, 8, 8).to(kernels.dtype)
    found = []
    for run in (conv3x3, torch.compile(conv3x3, fullgraph=True, backend="aot_eager")):
        leaves = [t.clone().requires_grad_() for t in (image, weight, bias, shift, residual)]
        with torch.autocast("cpu", torch.bfloat16, enabled=kernels is BFLOAT16):
            y = run(*leaves)
        y.square().sum().backward()
        found.append([y, *(leaf.grad for leaf in leaves)])
    assert found[0][0].dtype == kernels.dtype
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
