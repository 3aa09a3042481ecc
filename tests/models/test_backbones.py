"""Properties that UViT, RIN, DiT, JiT and HDiT share: the call, the start, gradients, sizes, precision, compilation."""

from __future__ import annotations

import pytest
import torch

from diffscale.models import create_model

DIT = {"name": "dit", "patch_size": 4, "width": 32, "depth": 2, "num_heads": 2}
JIT = {"name": "jit", "patch_size": 4, "width": 32, "depth": 2, "num_heads": 2, "context_tokens": 3, "bottleneck": 8}
RIN = {"name": "rin", "patch_size": 4, "interface_width": 16, "latents": 6, "latent_width": 32, "num_blocks": 2}
RIN |= {"layers": 1, "latent_heads": 4, "rw_heads": 2}
UVIT = {"name": "uvit", "conv_widths": (16,), "conv_blocks": 1, "width": 32, "depth": 2, "num_heads": 2}
UVIT |= {"embedding_width": 32}
HDIT = {"name": "hdit", "patch_size": 2, "widths": (16, 32), "depths": (1, 1), "head": 8, "kernel": 3}
HDIT |= {"mapping_width": 16}
VARIANTS = {
    "dit": DIT,
    "dit learned positions": DIT | {"positions": "learned"},
    "jit": JIT | {"context_start": 1},
    "jit without context": JIT | {"context_tokens": 0, "context_start": 0},
    "rin": RIN,
    "rin alone": RIN | {"self_conditioning": False, "interface_mlp_ratio": 0},
    "rin with exchange": RIN
    | {"start": "authors", "zero_writes": True, "write_heads": 4, "gated_writes": True, "rw_positions": True}
    | {"time_on_tiles": True, "tile_conv": 3, "late_latents": 2, "qk_norm": True},
    "uvit haar": UVIT,
    "uvit 5/3 residual": UVIT | {"patching": "5/3", "skips": "residual"},
    "uvit strided": UVIT | {"patching": "conv", "conv_widths": (8, 16), "conv_blocks": 2},
    "uvit pixels": UVIT | {"patch_levels": 0, "conv_widths": ()},
    "hdit": HDIT,
    "hdit three levels": HDIT | {"widths": (8, 16, 32), "depths": (1, 1, 2), "global_levels": 2},
}
STARTS_AT_ZERO = [name for name in VARIANTS if not name.startswith("rin")]


def build(variant: str, awake: bool = True, **settings) -> torch.nn.Module:
    """A tiny network; awake: with nothing left at zero, so that every part has an effect."""
    torch.manual_seed(0)
    model = create_model(**({"resolution": 16} | VARIANTS[variant] | settings))
    if awake:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.1 * torch.randn_like(parameter)
    return model.eval()


def inputs(batch: int = 3, height: int = 16, width: int = 16, channels: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.randn(batch, channels, height, width, generator=torch.Generator().manual_seed(1))
    return x, torch.linspace(-4, 4, batch)


@pytest.mark.parametrize("variant", STARTS_AT_ZERO)
def test_the_output_starts_at_exactly_zero(variant):
    x, logsnr = inputs()
    prediction, state = build(variant, awake=False, num_classes=4)(x, logsnr)
    assert torch.equal(prediction, torch.zeros_like(x))
    assert state is None


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients_reach_every_parameter(variant):
    model = build(variant, num_classes=4)
    x, logsnr = inputs()
    label = torch.tensor([0, 3, 4])
    _, state = model(x, logsnr, label)
    prediction, _ = model(x, logsnr, label, None if state is None else state.detach())
    prediction.square().mean().backward()
    trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    assert [n for n, p in trained if p.grad is None or not p.grad.abs().sum() > 0] == []
    assert all(p.grad.isfinite().all() for _, p in trained)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_batch_gives_the_same_as_its_images_one_by_one(variant):
    model = build(variant, num_classes=4)
    x, logsnr = inputs()
    label = torch.tensor([0, 3, 4])
    with torch.no_grad():
        together = model(x, logsnr, label)[0]
        alone = torch.cat([model(x[i : i + 1], logsnr[i : i + 1], label[i : i + 1])[0] for i in range(3)])
    assert (together - alone).abs().max() <= 2e-5 * together.abs().max()


@pytest.mark.parametrize("variant", VARIANTS)
def test_label_and_noise_level_change_the_output_and_no_label_is_the_one_after_the_last(variant):
    model = build(variant, num_classes=4)
    x, logsnr = inputs()
    with torch.no_grad():
        reference = model(x, logsnr, torch.tensor([0, 1, 2]))[0]
        assert (model(x, logsnr, torch.tensor([1, 2, 3]))[0] - reference).abs().amax((1, 2, 3)).min() > 1e-4
        assert (model(x, logsnr + 1, torch.tensor([0, 1, 2]))[0] - reference).abs().amax((1, 2, 3)).min() > 1e-4
        assert torch.equal(model(x, logsnr)[0], model(x, logsnr, torch.full((3,), 4))[0])
        assert not torch.equal(model(x, logsnr)[0], reference)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("size", [(16, 16), (24, 8), (13, 19), (3, 40)])
def test_any_size_in_is_the_same_size_out(variant, size):
    x, logsnr = inputs(2, *size)
    with torch.no_grad():
        prediction = build(variant)(x, logsnr)[0]
    assert prediction.shape == x.shape
    assert prediction.isfinite().all()


@pytest.mark.parametrize("variant", VARIANTS)
def test_other_numbers_of_channels_and_no_classes(variant):
    x, logsnr = inputs(channels=1)
    with torch.no_grad():
        assert build(variant, channels=1)(x, logsnr)[0].shape == x.shape


@pytest.mark.parametrize("variant", VARIANTS)
def test_activation_checkpointing_changes_neither_output_nor_gradient(variant):
    x, logsnr = inputs()
    results = []
    for enabled in (False, True):
        model = build(variant)
        model.set_activation_checkpointing(enabled)
        prediction = model(x, logsnr)[0]
        prediction.square().mean().backward()
        results.append([prediction.detach(), *(p.grad for p in model.parameters() if p.grad is not None)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("variant", ["dit", "jit", "rin", "uvit haar", "hdit"])
def test_compiles_into_one_graph_and_gives_the_same(variant):
    model = build(variant, num_classes=4)
    x, logsnr = inputs()
    label = torch.tensor([0, 3, 4])
    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True, backend="eager")(x, logsnr, label)[0]
        assert torch.allclose(compiled, model(x, logsnr, label)[0], atol=1e-5)


@pytest.mark.parametrize("variant", ["dit", "jit", "rin", "uvit haar", "hdit"])
def test_bfloat16_autocast_gives_float32_out_and_stays_close(variant):
    model = build(variant, num_classes=4)
    x, logsnr = inputs()
    with torch.no_grad():
        exact = model(x, logsnr)[0]
        with torch.autocast("cpu", torch.bfloat16):
            rough = model(x, logsnr)[0]
    assert rough.dtype == torch.float32
    assert (rough - exact).abs().mean() < 0.03 * exact.abs().mean()


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_blocks_to_shard_are_parts_of_the_model_in_the_order_in_which_they_run(variant):
    model = build(variant)
    blocks = model.blocks_for_fsdp()
    inside = [id(p) for block in blocks for p in block.parameters()]
    assert len(inside) == len(set(inside)) > 0
    assert set(inside) <= {id(p) for p in model.parameters()}
    ran: list[torch.nn.Module] = []
    for block in blocks:
        block.register_forward_pre_hook(lambda block, _: ran.append(block))
    model(*inputs())
    assert ran == blocks  # in this order, so that the next one's weights can be gathered ahead
    assert model.no_weight_decay() <= {name for name, _ in model.named_parameters()}


@pytest.mark.parametrize("variant", VARIANTS)
def test_costs_can_be_counted_on_the_meta_device(variant):
    with torch.device("meta"):
        model = create_model(**({"resolution": 16, "num_classes": 4} | VARIANTS[variant]))
        prediction, _ = model(torch.empty(2, 3, 16, 16), torch.empty(2), torch.empty(2, dtype=torch.long))
    assert prediction.shape == (2, 3, 16, 16)


@pytest.mark.parametrize("variant", ["dit", "jit", "rin", "uvit haar", "hdit"])
def test_dropout_acts_in_training_only(variant):
    rate = (0.5, 0.5) if variant == "hdit" else 0.5
    model = build(variant, dropout=rate, **({"depth": 4} if variant == "jit" else {}))
    x, logsnr = inputs()
    with torch.no_grad():
        assert torch.equal(model(x, logsnr)[0], model(x, logsnr)[0])
        model.train()
        assert not torch.equal(model(x, logsnr)[0], model(x, logsnr)[0])


@pytest.mark.parametrize(
    ("variant", "settings", "names"),
    [
        ("dit", {"patch_size": 17}, "patch_size = 17: expected 1 to 16"),
        ("dit", {"num_heads": 5}, "num_heads = 5: expected a divisor of the width 32"),
        ("dit", {"width": 30}, "width = 30: expected a multiple of 4"),
        ("jit", {"context_start": 2}, "context_start = 2: expected 0 to 1"),
        ("jit", {"num_heads": 16}, "num_heads = 16: .* divisible by 4"),
        ("rin", {"latents": 2, "num_classes": 4}, "latents = 2: expected more than the 2"),
        ("rin", {"rw_heads": 3}, "rw_heads = 3"),
        ("rin", {"write_heads": 5}, "write_heads = 5: expected a divisor of the width 16"),
        ("rin", {"tile_conv": 2}, "tile_conv = 2: expected an odd number"),
        ("rin", {"latent_width": 36}, "latent_width = 36: expected a multiple of 8"),
        (
            "uvit haar",
            {"conv_widths": (8, 8, 8, 8, 8)},
            "conv_widths = .*at most 4 levels with patch_levels, here 1, at a resolution of 16",
        ),
        ("uvit haar", {"patching": "db4"}, "patching = 'db4'"),
        ("hdit", {"kernel": 4}, "kernel = 4: expected an odd number"),
        ("hdit", {"depths": (1,)}, "widths = .*here 1 depths"),
        ("hdit", {"global_levels": 3}, "global_levels = 3: expected 0 to 2"),
        ("hdit", {"head": 12}, "head = 12: expected a multiple of 8"),
        ("dit", {"resolution": 0}, "resolution = 0"),
    ],
)
def test_settings_that_cannot_be_are_refused_by_name(variant, settings, names):
    with pytest.raises(ValueError, match=names):
        build(variant, awake=False, **settings)
