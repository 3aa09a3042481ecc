"""DiT: parameters to the unit, multiply-adds, and the output of the authors' network."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from diffscale.models import create_model
from diffscale.models.dit import DiT
from diffscale.models.transformer_layers import rotary_angles, rotate, sincos_positions

# Counted on the networks of facebookresearch/DiT, DiT_models[...](), with the frozen position table.
PARAMETERS = {
    "dit-s-2": 32_963_360,
    "dit-s-4": 32_945_024,
    "dit-s-8": 33_148_160,
    "dit-b-2": 130_512_416,
    "dit-b-4": 130_475_648,
    "dit-b-8": 130_881_536,
    "dit-l-2": 458_102_816,
    "dit-l-4": 458_053_760,
    "dit-l-8": 458_594_816,
    "dit-xl-2": 675_129_632,
    "dit-xl-4": 675_074_432,
    "dit-xl-8": 675_683_072,
}
GMACS = {"dit-xl-2": 118.62, "dit-s-2": 6.056, "dit-b-2": 23.01}  # the "Gflops" of Peebles and Xie 2022

EXPECTED = ([-1.3822, 1.17994, -1.34214], [0.19455, -0.08673, -0.89806])


@pytest.mark.parametrize(("name", "expected"), PARAMETERS.items())
def test_a_published_network_has_exactly_the_published_parameters(name, expected):
    with torch.device("meta"):
        assert sum(p.numel() for p in create_model(name).parameters()) == expected


@pytest.mark.parametrize(("name", "expected"), GMACS.items())
def test_multiply_adds_are_those_published(name, expected):
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        create_model(name)(torch.empty(1, 4, 32, 32), torch.empty(1), torch.empty(1, dtype=torch.long))
    assert counter.get_total_flops() / 2e9 == pytest.approx(expected, rel=4e-4)


def test_the_output_is_that_of_the_authors_network():
    """With parameters cos(k), k counting all trained values in the authors' order; facebookresearch/DiT gave these."""
    model = filled(DiT(8, 4, 5, patch_size=2, width=16, depth=2, num_heads=2, out_channels=8))
    x = torch.linspace(-2, 2, 2 * 4 * 64).view(2, 4, 8, 8)
    with torch.no_grad():
        out = model(x, torch.tensor([-1.0, 2.0]), torch.tensor([3, 5]))[0]
    assert out[0, :3, 1, 2].tolist() == pytest.approx(EXPECTED[0], abs=2e-4)
    assert out[1, -3:, 7, 0].tolist() == pytest.approx(EXPECTED[1], abs=2e-4)


def filled(model: DiT) -> DiT:
    start = 0
    for parameter in authors_order(model):
        stop = start + parameter.numel()
        parameter.data = 0.3 * torch.arange(start, stop, dtype=torch.float64).cos().float().view(parameter.shape)
        start = stop
    return model.eval()


def authors_order(model: DiT) -> list[torch.nn.Parameter]:
    """x_embedder, t_embedder, y_embedder, blocks (attention, MLP, modulation), final layer (linear, modulation)."""
    order = [model.embed_patches, model.embed_noise.linear1, model.embed_noise.linear2, model.embed_label]
    for block in model.blocks:
        order += [block.qkv, block.out, block.mlp.fc1, block.mlp.fc2, block.modulation]
    return [p for layer in [*order, model.head, model.modulation] for p in layer.parameters()]


def test_the_position_table_is_frozen_or_learned_and_starts_the_same():
    frozen, learned = (DiT(16, width=32, depth=1, num_heads=2, positions=kind) for kind in ("fixed", "learned"))
    assert not frozen.positions.requires_grad
    assert learned.positions.requires_grad
    assert torch.equal(frozen.positions, learned.positions)


def test_a_copy_that_is_not_trained_keeps_its_learned_positions_at_other_sizes():
    torch.manual_seed(0)
    model = DiT(16, width=32, depth=1, num_heads=2, positions="learned")
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    x, logsnr = torch.randn(1, 3, 24, 8), torch.zeros(1)
    with torch.no_grad():
        trained = model(x, logsnr)[0]
        assert torch.equal(model.requires_grad_(False)(x, logsnr)[0], trained)


def test_positions_stretch_over_other_grids():
    native = sincos_positions(4, 4, 16, native=(4, 4))
    doubled = sincos_positions(8, 8, 16, native=(4, 4)).view(8, 8, 16)
    assert torch.allclose(doubled[::2, ::2].flatten(0, 1), native)
    grid = native.view(4, 4, 16)
    assert torch.equal(grid[0, :, :8], grid[3, :, :8])  # the first half knows the column alone
    assert torch.equal(grid[:, 0, 8:], grid[:, 3, 8:])  # the second the row alone


def test_rotation_keeps_lengths_and_makes_products_depend_on_the_offset_alone():
    angles = rotary_angles(5, 6, 8, native=(5, 6))
    q, k = torch.randn(2, 8)
    turned_q, turned_k = (rotate(t.expand(30, 8), angles.cos(), angles.sin()) for t in (q, k))
    assert torch.allclose(turned_q.norm(dim=-1), q.norm().expand(30), atol=1e-5)
    products = (turned_q @ turned_k.T).view(5, 6, 5, 6)
    assert torch.allclose(products[1, 2, 3, 5], products[0, 0, 2, 3], atol=1e-5)
