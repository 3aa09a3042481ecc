"""Accelerated models compute what the plain ones compute, up to rounding, and are the same models on disk."""

from __future__ import annotations

import copy

import pytest
import torch

from diffscale.kernels.winograd import BFLOAT16, FLOAT32
from diffscale.models import create_model
from diffscale.models.accelerate import (
    FusedGridTables,
    FusedHDiTBlock,
    WinogradConv2d,
    accelerate,
    winograd_layers,
)
from diffscale.models.hdit import Grid, GridTables, HDiTBlock
from diffscale.models.neighbourhood_attention import near_pixels
from diffscale.training.numerics import Numerics, compile_blocks

needs_kernels = pytest.mark.skipif(not FLOAT32.available, reason="no C++ compiler on this machine")
needs_bfloat16 = pytest.mark.skipif(not BFLOAT16.available, reason="no compiler, or no products of bfloat16 here")
SONG = {"adaptive_scale": False, "residual_scale": 0.5**0.5, "resample_projection": True, "label_joins": "noise"}
NETWORKS = {
    "unet": {"name": "unet-tiny"},
    "unet without norm": {"name": "unet-tiny", "norm": "none"},
    "unet without residual": {"name": "unet-tiny", "residual": False},
    "ddpm": {"name": "unet-tiny", "adaptive_scale": False, "resample": "conv"},
    "ncsn++": {"name": "unet-tiny", "input_pyramid": "residual", "output_pyramid": True} | SONG,
    "uvit": {"name": "uvit-tiny"},
    "edm2": {"name": "edm2-tiny"},
}


def network(which: str = "unet") -> torch.nn.Module:
    """A network with nothing at zero, so that every part has an effect."""
    torch.manual_seed(0)
    model = create_model(**({"resolution": 16} | NETWORKS[which]))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return model.eval().to(memory_format=torch.channels_last)


def images(batch: int = 2) -> torch.Tensor:
    x = torch.randn(batch, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    return x.contiguous(memory_format=torch.channels_last)


def results(model: torch.nn.Module, precision: str = "fp32") -> tuple[torch.Tensor, torch.Tensor]:
    """The output and all gradients in one vector."""
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        y = model(images(), torch.zeros(2))[0]
    y.square().mean().backward()
    return y.detach(), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def classes(model: torch.nn.Module) -> list[type]:
    return [type(module) for module in model.modules()]


@needs_kernels
@pytest.mark.parametrize(("winograd", "tolerance"), [(False, 1e-5), (True, 1e-4)])
@pytest.mark.parametrize("which", NETWORKS)
def test_plain_and_accelerated_agree(which, winograd, tolerance):
    plain, model = network(which), accelerate(network(which), winograd=winograd)
    (y, gradients), (expected, exact) = results(model), results(plain)
    assert (y - expected).abs().max() < tolerance * expected.abs().max()
    assert (gradients - exact).norm() < tolerance * exact.norm()
    if winograd:
        assert not torch.equal(y, expected)


@needs_kernels
@pytest.mark.parametrize("which", NETWORKS)
def test_activation_checkpointing_changes_nothing(which):
    """Checkpointing lets a kernel's backward pass read what it saved only once."""
    plain, checkpointed = (accelerate(network(which), winograd=True) for _ in range(2))
    checkpointed.set_activation_checkpointing(True)
    for ours, expected in zip(results(checkpointed), results(plain), strict=True):
        assert torch.equal(ours, expected)


@needs_kernels
@pytest.mark.parametrize("winograd", [False, pytest.param(True, marks=needs_bfloat16)])
@pytest.mark.parametrize("which", NETWORKS)
def test_in_bf16_it_is_about_as_exact_as_the_plain_network(which, winograd):
    """Against float32. Winograd's rounding in bf16 is about twice that of direct convolution (kernels/winograd.py)."""
    plain, model = network(which), accelerate(network(which), winograd=winograd)
    exact = results(plain)
    for ours, theirs, want in zip(results(model, "bf16"), results(plain, "bf16"), exact, strict=True):
        assert (ours - want).norm() < (3 if winograd else 1.5) * (theirs - want).norm()


@pytest.mark.parametrize("which", NETWORKS)
def test_the_state_dict_stays_the_same_and_goes_both_ways(which):
    plain = network(which)
    model = accelerate(copy.deepcopy(plain), winograd=True)
    before, after = plain.state_dict(), model.state_dict()
    assert list(before) == list(after)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert [name for name, _ in plain.named_modules()] == [name for name, _ in model.named_modules()]
    plain.load_state_dict(after)
    model.load_state_dict(before)


@pytest.mark.parametrize("which", NETWORKS)
def test_it_is_idempotent_and_winograd_can_be_taken_back(which):
    model = network(which)
    assert accelerate(model, winograd=False) is model
    without = classes(model)
    with_winograd = classes(accelerate(model, winograd=True))
    assert classes(accelerate(model, winograd=True)) == with_winograd != without
    assert classes(accelerate(model, winograd=False)) == without


def test_a_model_as_built_is_plain_and_one_on_another_device_stays_plain():
    model = network()
    assert not any("Fused" in kind.__name__ or "Winograd" in kind.__name__ for kind in classes(model))
    with torch.device("meta"):
        model = create_model("unet-tiny")
    plain = classes(model)
    assert classes(accelerate(model, winograd=True)) == plain


def test_numerics_installs_it():
    model = Numerics(channels_last=True, winograd=True).prepare(network())
    assert WinogradConv2d in classes(model)
    assert WinogradConv2d not in classes(Numerics(channels_last=True).prepare(model))


def test_convolutions_of_other_networks_and_those_before_a_filter_are_left_alone():
    model = torch.nn.Sequential(torch.nn.Conv2d(8, 8, 3, padding=1))
    assert [*winograd_layers(model)] == []
    pyramid = create_model("unet-tiny", input_pyramid="residual")
    assert not {id(p.conv) for p in pyramid.pyramid_in.values()} & {id(layer) for layer in winograd_layers(pyramid)}


def test_a_class_that_sharding_made_of_a_block_stays_underneath():
    """FSDP2 gives each sharded module a subclass of its own class."""
    model, plain = network(), network()
    block = model.encoder[0]
    block.__class__ = type("Sharded", (type(block),), {"marker": True})
    accelerate(model, winograd=False)
    assert block.marker
    assert torch.equal(results(model)[0], results(accelerate(plain, winograd=False))[0])
    kinds = classes(model)
    assert classes(accelerate(model, winograd=False)) == kinds


@needs_kernels
class OnAnyDevice(FusedGridTables):
    """The masks that a GPU gets, on the CPU."""

    def forward(self, height: int, width: int) -> Grid:
        grid = GridTables.forward(self, height, width)
        return grid if self.kernel is None else grid._replace(around=near_pixels(height, width, self.kernel))


def test_hdit_compiles_whole_with_the_attention_that_a_gpu_gets():
    """FlexAttention is compiled as a part of the block; without gradients it exists on a CPU too."""
    fused = create_model("hdit-tiny").eval()
    with torch.no_grad():
        for parameter in fused.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    plain = copy.deepcopy(fused)
    for module in fused.modules():
        kind = {GridTables: OnAnyDevice, HDiTBlock: FusedHDiTBlock}.get(type(module))
        module.__class__ = kind or type(module)
    torch._dynamo.reset()
    compile_blocks(fused, "eager")
    x, logsnr = torch.randn(2, 3, 32, 32), torch.zeros(2)
    with torch.no_grad():
        torch.testing.assert_close(fused(x, logsnr)[0], plain(x, logsnr)[0], rtol=1e-4, atol=1e-5)


def test_compiled_it_is_one_graph_and_gives_the_same():
    model = accelerate(network(), winograd=True)
    expected, exact = results(model)
    model.compile(fullgraph=True, backend="aot_eager")
    y, gradients = results(model)
    assert torch.allclose(y, expected, rtol=1e-4, atol=1e-5)
    assert (gradients - exact).norm() < 1e-4 * exact.norm()


@needs_kernels
def test_kept_filters_follow_the_weights_and_are_not_copied():
    layer, image = torch.nn.Conv2d(16, 16, 3, padding=1), torch.randn(2, 16, 8, 8)
    layer.__class__ = WinogradConv2d
    for change in (
        lambda: None,
        lambda: layer.weight.mul_(2),
        lambda: layer.load_state_dict(torch.nn.Conv2d(16, 16, 3, padding=1).state_dict()),
    ):
        with torch.no_grad():
            change()
            kept = layer(image)
        assert torch.equal(kept, layer(image))  # with gradients: transformed anew
    assert copy.deepcopy(layer)._filters is None
