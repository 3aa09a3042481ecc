"""HDiT: neighbourhood attention against brute force, the released network's sizes and output."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention.flex_attention import flex_attention

from diffscale.models import create_model
from diffscale.models.hdit import HDiT, axial_positions, fold, spread
from diffscale.models.neighbourhood_attention import (
    fused_neighbourhood_attention,
    near_pixels,
    neighbourhood_attention,
    windows,
)

# Made by building crowsonkb/k-diffusion's ImageTransformerDenoiserModelV2; arXiv 2401.11605 has 557 M for the last.
PARAMETERS = {"hdit-flowers256": 22_361_274, "hdit-imagenet128": 117_003_037, "hdit-imagenet256": 557_416_266}
EXPECTED = ([0.05199, -0.08261, 0.10624], [0.0014, 0.00178, -0.0048])


def brute_force(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, kernel: int) -> torch.Tensor:
    """Pixel by pixel: the window around it, moved inward at the border."""
    height, width = q.shape[2:4]
    rows, columns = min(kernel, height), min(kernel, width)
    out = torch.empty_like(q)
    for i in range(height):
        for j in range(width):
            top = min(max(i - rows // 2, 0), height - rows)
            left = min(max(j - columns // 2, 0), width - columns)
            around = (..., slice(top, top + rows), slice(left, left + columns), slice(None))
            keys, values = k[around].flatten(2, 3), v[around].flatten(2, 3)
            out[:, :, i, j] = ((q[:, :, i, j, None] @ keys.transpose(-1, -2)).softmax(-1) @ values)[:, :, 0]
    return out


@pytest.mark.parametrize("grid", [(16, 16), (17, 9), (5, 20), (25, 3), (1, 1), (8, 12)])
@pytest.mark.parametrize("kernel", [3, 7])
def test_neighbourhood_attention_is_that_of_the_definition(grid, kernel):
    q, k, v = torch.randn(3, 2, 3, *grid, 8, generator=torch.Generator().manual_seed(0), requires_grad=True)
    fast = neighbourhood_attention(q, k, v, windows(*grid, kernel, q.device))
    slow = brute_force(q, k, v, kernel)
    assert torch.allclose(fast, slow, atol=1e-5)
    gradients = [torch.autograd.grad(out.square().sum(), (q, k, v)) for out in (fast, slow)]
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize("grid", [(16, 16), (17, 9), (5, 20), (1, 3)])
def test_the_fused_neighbourhood_attention_is_that_of_the_definition(grid):
    """FlexAttention without compilation computes by its definition; its gradient exists on a GPU alone."""
    q, k, v = torch.randn(3, 2, 3, *grid, 16, generator=torch.Generator().manual_seed(0))
    fused = fused_neighbourhood_attention(q, k, v, near_pixels(*grid, 7), flex_attention)
    assert torch.allclose(fused, neighbourhood_attention(q, k, v, windows(*grid, 7)), atol=1e-5)


def test_the_fused_attention_passes_over_most_blocks_of_a_large_grid():
    """A block of 128 is two rows of 64; with 3 rows above and below, a window touches 4 or 5 of the 32 blocks."""
    assert near_pixels(64, 64, 7).sparsity() == pytest.approx(100 * (1 - 4.875 / 32))


def test_every_pixel_sees_as_many_keys_at_the_border_as_inside():
    mask = windows(20, 13, 5, torch.device("cpu")).mask
    assert (mask.sum(-1) == 25).all()


@pytest.mark.parametrize(("name", "expected"), PARAMETERS.items())
def test_a_released_network_has_exactly_its_parameters(name, expected):
    with torch.device("meta"):
        assert sum(p.numel() for p in create_model(name).parameters()) == expected


def test_the_output_is_that_of_the_released_network():
    """With parameters 0.3·cos(k), k counting all values in their order, and frequencies fixed; their code gave these
    (with the definition of neighbourhood attention above in the place of NATTEN's kernel)."""
    model = HDiT(16, 3, 5, patch_size=2, widths=(16, 32), depths=(1, 1), head=16, kernel=3, mapping_width=16)
    model.embed_noise.frequencies = torch.linspace(-1, 1, 8)
    start = 0
    for parameter in authors_order(model):
        stop = start + parameter.numel()
        values = 0.3 * torch.arange(start, stop, dtype=torch.float64).cos().float()
        parameter.data = (values.abs() if parameter.dim() == 1 else values).view(parameter.shape)
        start = stop
    x = torch.linspace(-2, 2, 2 * 3 * 16 * 16).view(2, 3, 16, 16)
    with torch.no_grad():
        out = model.eval()(x, torch.tensor([-1.0, 2.0]), torch.tensor([3, 4]))[0]
    assert out[0, :, 1, 2].tolist() == pytest.approx(EXPECTED[0], abs=2e-5)
    assert out[1, :, 15, 0].tolist() == pytest.approx(EXPECTED[1], abs=2e-5)


def authors_order(model: HDiT) -> list[torch.nn.Parameter]:
    """Patches in, time, class, mapping, levels down, levels up, middle, merges, splits, norm, patches out."""
    order = [model.patch_in.weight, model.noise_in.weight, model.embed_label.weight, model.mapping.gains[0]]
    for gain, block in zip(list(model.mapping.gains)[1:-1], model.mapping.blocks, strict=True):
        order += [gain, block.up.weight, block.down.weight]
    order.append(model.mapping.gains[-1])
    for layer in [*model.down[0], *model.up[0], *model.middle]:
        order += [layer.sharpness, layer.scale1.weight, layer.qkv.weight, layer.out.weight]
        order += [layer.scale2.weight, layer.mlp.up.weight, layer.mlp.down.weight]
    order += [model.merges[0].weight, model.splits[0].share, model.splits[0].linear.weight]
    return [*order, model.out_gain, model.patch_out.weight]


def test_folding_and_spreading_are_inverse():
    x = torch.randn(2, 6, 4, 5)
    assert fold(x, 2).shape == (2, 3, 2, 20)
    assert torch.equal(spread(fold(x, 2), 2), x)


def test_positions_are_centred_and_keep_the_aspect_ratio():
    grid = axial_positions(2, 4, torch.device("cpu"))
    assert grid[0, :, 1].tolist() == [-0.75, -0.25, 0.25, 0.75]
    assert grid[:, 0, 0].tolist() == [-0.25, 0.25]


def test_the_skip_starts_half_way_between_skip_and_split():
    split = HDiT(16, patch_size=2, widths=(16, 32), depths=(1, 1), head=16).splits[0]
    x, skip = torch.randn(1, 2, 2, 32), torch.randn(1, 4, 4, 16)
    assert torch.allclose(split(x, skip), (spread(split.linear(x), 2) + skip) / 2, atol=1e-6)


def test_the_augmentation_label_changes_the_output():
    torch.manual_seed(0)
    model = HDiT(16, patch_size=2, widths=(16, 32), depths=(1, 1), head=16, augment_dim=9)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    x = torch.randn(1, 3, 16, 16)
    with torch.no_grad():
        plain = model(x, torch.zeros(1))[0]
        assert torch.equal(model(x, torch.zeros(1), augment_label=torch.zeros(1, 9))[0], plain)
        assert not torch.allclose(model(x, torch.zeros(1), augment_label=torch.ones(1, 9))[0], plain)
