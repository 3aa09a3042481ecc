"""UViT: what is folded, where dropout is, and the residual form of SiD2."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from diffscale.models import create_model
from diffscale.models.uvit import UViT

TINY = {"resolution": 16, "conv_widths": (8,), "conv_blocks": 1, "width": 16, "depth": 1, "num_heads": 2}
TINY |= {"embedding_width": 16}


def inputs(batch: int = 2, side: int = 16) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.randn(batch, 3, side, side, generator=torch.Generator().manual_seed(1))
    return x, torch.linspace(-4, 4, batch)


def awake(**settings) -> UViT:
    torch.manual_seed(0)
    model = UViT(**(TINY | settings))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model.eval()


@pytest.mark.parametrize(("patching", "levels"), [("haar", 1), ("5/3", 1), ("haar", 2), ("conv", 1), ("conv", 2)])
def test_folding_brings_the_transformer_to_the_same_grid_whatever_does_it(patching, levels):
    model = UViT(**(TINY | {"patching": patching, "patch_levels": levels}))
    assert model.native == (16 // 2 ** (levels + 1),) * 2
    assert model.conv_out.out_channels == 3 * 4**levels


def test_the_published_sizes_run_their_transformer_at_16_by_16_and_have_two_billion_parameters():
    for name in ("uvit-imagenet128", "uvit-imagenet256", "uvit-imagenet512"):
        with torch.device("meta"):
            model = create_model(name)
        assert model.native == (16, 16)
        assert 1.9e9 < sum(p.numel() for p in model.parameters()) < 2.3e9  # "2B" in arXiv 2301.11093


def test_the_residual_form_has_one_skip_per_level_and_narrower_blocks():
    joined, residual = awake(skips="block"), awake(skips="residual")
    assert joined.levels[0].up[0].conv1.in_channels == 16
    assert residual.levels[0].up[0].conv1.in_channels == 8


def test_the_residual_form_passes_on_what_the_levels_below_changed():
    """SiD2: x = up(below(h) − h) + x, so a transformer that changes nothing leaves the level as it was."""
    model = awake(skips="residual", depth=0)
    with torch.no_grad():
        model.positions.zero_()
    level = model.levels[0]
    x = torch.randn(2, 8, 8, 8)
    embedding = torch.randn(2, 16)
    with torch.no_grad():
        before = level.down[0](x, embedding)
        nothing = F.interpolate(level.widen(torch.zeros(2, 16, 4, 4)), scale_factor=2)
        expected = level.up[0](before + nothing, embedding)
        assert torch.allclose(model.descend(x, embedding, 0), expected, atol=1e-5)


def test_dropout_is_only_where_the_side_is_small():
    model = UViT(**(TINY | {"resolution": 128, "conv_widths": (8, 8, 8), "dropout": 0.2}))  # sides 64, 32, 16
    rates = [level.down[0].dropout.p for level in model.levels]
    assert rates == [0.0, 0.0, 0.2]
    assert model.blocks[0].dropout.p == 0.2


def test_every_block_starts_as_nothing():
    torch.manual_seed(0)
    model = UViT(**TINY)
    x, embedding = torch.randn(2, 8, 4, 4), torch.randn(2, 16)
    assert torch.equal(model.levels[0].down[0](x, embedding), x)
    tokens = torch.randn(2, 5, 16)
    assert torch.equal(model.blocks[0](tokens, embedding), tokens)


def test_channels_last_changes_nothing():
    model = awake()
    x, logsnr = inputs()
    with torch.no_grad():
        plain = model(x, logsnr)[0]
        model = model.to(memory_format=torch.channels_last)
        assert torch.allclose(model(x.contiguous(memory_format=torch.channels_last), logsnr)[0], plain, atol=1e-4)


def test_padding_inside_leaves_the_sizes_that_fit_alone_and_repeats_the_border_of_others():
    model = awake()
    x, logsnr = inputs()
    cut = x[:, :, :15, :13]
    with torch.no_grad():
        by_hand = model(F.pad(cut, (0, 3, 0, 1), mode="replicate"), logsnr)[0][:, :, :15, :13]
        assert torch.equal(model(cut, logsnr)[0], by_hand)
