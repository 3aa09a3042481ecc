"""The fused norm on a CPU gives what torch's operations give, forward and backward, in any layout and thread count."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from diffscale.kernels import group_norm as module
from diffscale.kernels.compile import library
from diffscale.kernels.group_norm import norm_act

needs_kernel = pytest.mark.skipif(library("group_norm") is None, reason="no C++ compiler on this machine")
SHAPES = [(2, 32, 9, 7, 8), (3, 48, 4, 4, 12), (1, 160, 5, 3, 1), (4, 256, 2, 2, 32), (2, 6, 8, 8, 1)]


def data(b: int, c: int, h: int, w: int, dtype: torch.dtype = torch.float32):
    generator = torch.Generator().manual_seed(b * c + h)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    x = (3 * draw(b, c, h, w) + 5).to(dtype).contiguous(memory_format=torch.channels_last)
    return x, draw(c), draw(c), draw(b, c), draw(b, c), draw(b, c, h, w).to(dtype)


def by_definition(x, weight, bias, groups, eps, scale, shift, silu):
    y = F.group_norm(x, groups, weight, bias, eps)
    y = y * (1 + scale[:, :, None, None]) + shift[:, :, None, None]
    return F.silu(y) if silu else y


@needs_kernel
@pytest.mark.parametrize("silu", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 4e-3)])
def test_values_and_gradients_are_those_of_the_definition_in_float64(shape, silu, dtype, tolerance):
    *size, groups = shape
    *tensors, upstream = data(*size, dtype=dtype)
    leaves = [t.clone(memory_format=torch.preserve_format).requires_grad_() for t in tensors]
    exact = [t.detach().double().requires_grad_() for t in tensors]
    x, weight, bias, scale, shift = leaves
    assert module._suits_kernel(x)
    y = norm_act(x, weight, bias, groups, 1e-5, scale=scale, shift=shift, silu=silu)
    expected = by_definition(*exact[:3], groups, 1e-5, *exact[3:], silu)
    y.backward(upstream)
    expected.backward(upstream.double())
    assert y.dtype == dtype
    assert (y.double() - expected).norm() <= tolerance * expected.norm()
    for leaf, reference in zip(leaves, exact, strict=True):
        assert (leaf.grad.double() - reference.grad).norm() <= tolerance * reference.grad.norm()


@needs_kernel
def test_compiled_it_is_one_graph_of_the_same_kernels():
    """fullgraph=True raises at a graph break; `aot_eager` runs the traced operations as they are."""
    *tensors, upstream = data(3, 48, 4, 4)
    found = []
    for run in (norm_act, torch.compile(norm_act, fullgraph=True, backend="aot_eager")):
        x, weight, bias, scale, shift = (t.clone(memory_format=torch.preserve_format).requires_grad_() for t in tensors)
        y = run(x, weight, bias, 12, 1e-5, scale=scale, shift=shift)
        y.backward(upstream)
        found.append([y, x.grad, weight.grad, bias.grad, scale.grad, shift.grad])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@needs_kernel
def test_a_large_mean_does_not_cancel():
    x = (1000 + torch.randn(2, 32, 8, 8)).contiguous(memory_format=torch.channels_last)
    ones, zeros = torch.ones(32), torch.zeros(32)
    exact = F.group_norm(x.double(), 8, ones.double(), zeros.double(), 1e-5)
    assert (norm_act(x, ones, zeros, 8, 1e-5, silu=False) - exact).abs().max() < 1e-3


@needs_kernel
def test_extreme_inputs_stay_finite():
    x = torch.linspace(-1e4, 1e4, 2 * 8 * 4 * 4).reshape(2, 8, 4, 4).contiguous(memory_format=torch.channels_last)
    x.requires_grad_()
    y = norm_act(x, torch.full((8,), 200.0), torch.zeros(8), 2, 1e-5)
    y.sum().backward()
    assert y.isfinite().all()
    assert x.grad.isfinite().all()
    assert (y >= -0.2785).all()  # the minimum of SiLU


@needs_kernel
def test_the_number_of_threads_changes_no_bit():
    x, weight, bias, scale, shift, upstream = data(5, 256, 16, 16)
    results, threads = [], torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            leaf = x.clone(memory_format=torch.preserve_format).requires_grad_()
            y = norm_act(leaf, weight, bias, 32, 1e-5, scale=scale, shift=shift)
            y.backward(upstream)
            results.append((y.detach(), leaf.grad))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for r in results[1:] for a, b in zip(r, results[0], strict=True))


def test_contiguous_images_take_torchs_path_and_agree():
    x, weight, bias, scale, shift, _ = data(2, 32, 6, 6)
    assert not module._suits_kernel(x.contiguous())
    plain = norm_act(x.contiguous(), weight, bias, 8, 1e-5, scale=scale, shift=shift)
    assert torch.allclose(plain, by_definition(x, weight, bias, 8, 1e-5, scale, shift, True), atol=1e-5)
    assert torch.allclose(norm_act(x, weight, bias, 8, 1e-5, scale=scale, shift=shift), plain, atol=1e-5)
