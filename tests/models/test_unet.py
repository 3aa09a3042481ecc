"""The UNet: its initial output, its inputs, its sizes, and each ingredient that can be switched off."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from diffscale.models import create_model
from diffscale.models.layers import noise_condition
from diffscale.models.unet import UNet

TINY = {"resolution": 16, "model_channels": 16, "channel_mult": (1, 2), "num_blocks": 1, "attn_resolutions": (8,)}
TINY |= {"channels_per_head": 16}
SONG = {"adaptive_scale": False, "residual_scale": 0.5**0.5, "resample_projection": True, "label_joins": "noise"}
VARIANTS = {
    "adm": {},
    "ddpm": {"adaptive_scale": False, "resample": "conv", "num_heads": 1, "noise_input": "ddpm"},
    "ddpm++": SONG | {"init": "xavier", "zero_gain": 1e-5, "noise_embedding": "sinusoidal_endpoint"},
    "ncsn++": SONG | {"noise_embedding": "fourier", "input_pyramid": "residual", "resample_filter": (1, 3, 3, 1)},
    "pyramids": SONG | {"input_pyramid": "skip", "output_pyramid": True, "resample_filter": (1, 3, 3, 1)},
    "no skips": {"skips": False},
    "no residual": {"residual": False},
    "no norm": {"norm": "none"},
    "layer norm": {"norm": "layer"},
    "no attention": {"attn_resolutions": (), "middle_attention": False},
    "dropout": {"dropout": 0.5},
}


def awake(name: str = "unet", **settings) -> torch.nn.Module:
    """A network with nothing at zero, so that every part has an effect."""
    torch.manual_seed(0)
    model = create_model(name, **(TINY | settings))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return model.eval()


def inputs(batch: int = 3, height: int = 16, width: int = 16) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batch, 3, height, width, generator=generator)
    return x, torch.linspace(-4, 4, batch)


def test_the_output_starts_at_exactly_zero():
    torch.manual_seed(0)
    x, logsnr = inputs()
    prediction, state = UNet(**TINY)(x, logsnr)
    assert torch.equal(prediction, torch.zeros_like(x))
    assert state is None


def test_songs_initialisation_starts_near_zero_but_not_at_it():
    torch.manual_seed(0)
    prediction = UNet(**TINY, **VARIANTS["ddpm++"])(*inputs())[0]
    assert 0 < prediction.abs().max() < 1e-3


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients_reach_every_parameter(variant):
    model = awake(num_classes=4, augment_dim=9, image_channels=2, **VARIANTS[variant])
    x, logsnr = inputs()
    image, augment = torch.randn(3, 2, 16, 16), torch.randn(3, 9)
    prediction, _ = model(x, logsnr, torch.tensor([0, 3, 4]), augment_label=augment, image=image)
    prediction.square().mean().backward()
    silent = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert silent == []
    assert all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_batch_gives_the_same_as_its_images_one_by_one(variant):
    model = awake(num_classes=4, **VARIANTS[variant])
    x, logsnr = inputs()
    label = torch.tensor([0, 3, 4])
    with torch.no_grad():
        together = model(x, logsnr, label)[0]
        alone = torch.cat([model(x[i : i + 1], logsnr[i : i + 1], label[i : i + 1])[0] for i in range(3)])
    assert (together - alone).abs().max() <= 2e-5 * together.abs().max()


@pytest.mark.parametrize("variant", ["adm", "ddpm", "ncsn++", "pyramids", "no skips"])
@pytest.mark.parametrize("size", [(16, 16), (15, 17), (9, 24), (1, 3)])
def test_any_size_in_is_the_same_size_out(variant, size):
    x, logsnr = inputs(2, *size)
    with torch.no_grad():
        assert awake(channel_mult=(1, 1, 2), **VARIANTS[variant])(x, logsnr)[0].shape == x.shape


def test_padding_inside_leaves_the_sizes_that_fit_alone_and_repeats_the_border_of_others():
    model = awake()
    x, logsnr = inputs(2, 15, 13)
    with torch.no_grad():
        by_hand = model(F.pad(x, (0, 1, 0, 1), mode="replicate"), logsnr)[0][:, :, :15, :13]
        assert torch.equal(model(x, logsnr)[0], by_hand)


def test_each_input_changes_the_output():
    model = awake(num_classes=4, augment_dim=9, image_channels=2)
    x, logsnr = inputs()
    base = {"label": torch.tensor([0, 1, 2]), "augment_label": torch.ones(3, 9), "image": torch.ones(3, 2, 16, 16)}
    with torch.no_grad():
        reference = model(x, logsnr, **base)[0]
        for change in ({"label": torch.tensor([1, 2, 3])}, {"augment_label": None}, {"image": None}):
            assert (model(x, logsnr, **(base | change))[0] - reference).abs().amax((1, 2, 3)).min() > 1e-4, change
        assert (model(x, logsnr + 1, **base)[0] - reference).abs().amax((1, 2, 3)).min() > 1e-4


@pytest.mark.parametrize("variant", ["adm", "ddpm++"])
def test_no_label_is_the_label_after_the_last(variant):
    model = awake(num_classes=4, **VARIANTS[variant])
    x, logsnr = inputs()
    with torch.no_grad():
        assert torch.equal(model(x, logsnr)[0], model(x, logsnr, torch.full((3,), 4))[0])


def test_the_conditioning_image_may_have_another_size():
    model = awake(image_channels=3)
    x, logsnr = inputs()
    small = torch.randn(3, 3, 8, 8)
    large = F.interpolate(small, (16, 16), mode="bilinear", align_corners=False)
    with torch.no_grad():
        assert torch.equal(model(x, logsnr, image=small)[0], model(x, logsnr, image=large)[0])


def test_without_skips_the_decoder_sees_only_the_bottleneck():
    x, logsnr = inputs(1)
    detail = torch.zeros_like(x)
    detail[..., ::2, ::2], detail[..., 1::2, 1::2] = 1.0, 1.0
    with torch.no_grad():
        for skips, sees in ((True, True), (False, False)):
            model = awake(skips=skips)
            for block in model.middle:  # nothing gets through the bottleneck
                block.register_forward_hook(lambda module, args, out: torch.zeros_like(out))
            changed = (model(x, logsnr)[0] - model(x + detail, logsnr)[0]).abs().max() > 1e-6
            assert bool(changed) is sees


def test_dropout_acts_in_training_only():
    model = awake(dropout=0.5)
    x, logsnr = inputs()
    with torch.no_grad():
        assert torch.equal(model(x, logsnr)[0], model(x, logsnr)[0])
        model.train()
        assert not torch.equal(model(x, logsnr)[0], model(x, logsnr)[0])


@pytest.mark.parametrize(("resolution", "levels"), [(16, {1}), (12, {1}), (24, {2}), (32, {2})])
def test_attention_is_at_the_first_level_no_larger_than_the_requested_side(resolution, levels):
    model = create_model("unet", **(TINY | {"resolution": resolution, "channel_mult": (1, 1, 1, 1)}))
    attending = {i // 2 for i, block in enumerate(model.encoder) if getattr(block, "attention", None) is not None}
    assert attending == levels


@pytest.mark.parametrize("variant", ["adm", "dropout"])
def test_activation_checkpointing_changes_neither_output_nor_gradient(variant):
    model = awake(**VARIANTS[variant]).train()
    gradients = []
    for enabled in (False, True):
        model.set_activation_checkpointing(enabled)
        model.zero_grad()
        torch.manual_seed(3)
        model(*inputs())[0].square().mean().backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-7) for a, b in zip(*gradients, strict=True))


def test_activation_checkpointing_keeps_less_for_the_backward_pass():
    def kept_bytes(enabled: bool) -> int:
        model = awake()
        model.set_activation_checkpointing(enabled)
        own, total = {p.data_ptr() for p in model.parameters()}, {}

        def pack(t):
            if t.data_ptr() not in own:
                total[t.data_ptr()] = t.untyped_storage().nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            prediction = model(*inputs(8))[0]
        assert prediction.requires_grad
        return sum(total.values())

    assert kept_bytes(True) < 0.5 * kept_bytes(False)


def test_bfloat16_autocast_gives_float32_out_and_stays_close():
    model = awake()
    x, logsnr = inputs()
    with torch.no_grad():
        exact = model(x, logsnr)[0]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            rounded = model(x.to(memory_format=torch.channels_last), logsnr)[0]
    assert rounded.dtype == torch.float32
    assert (rounded - exact).norm() < 0.05 * exact.norm()


def test_the_blocks_to_shard_hold_nearly_all_parameters_and_none_twice():
    model = create_model("unet", **TINY)
    in_blocks = [id(p) for block in model.blocks_for_fsdp() for p in block.parameters()]
    assert len(in_blocks) == len(set(in_blocks))
    assert set(in_blocks) <= {id(p) for p in model.parameters()}


@pytest.mark.parametrize(
    ("settings", "names"),
    [
        ({"channel_mult": ()}, "channel_mult"),
        ({"num_blocks": 0}, "num_blocks"),
        ({"resolution": 0}, "resolution"),
        ({"num_heads": 3}, "num_heads"),
        ({"resample_filter": (1, 2, 1)}, "resample_filter"),
        ({"noise_input": "sigma"}, "noise_input"),
    ],
)
def test_settings_that_cannot_be_are_refused_by_name(settings, names):
    with pytest.raises(ValueError, match=names):
        create_model("unet", **(TINY | settings))(*inputs())


def test_an_unknown_model_is_refused_with_the_nearest_names():
    with pytest.raises(ValueError, match="ddpm-cifar10"):
        create_model("ddpm-cifar")


def test_noise_conditions_match_their_definitions():
    logsnr = torch.tensor([-6.0, 0.0, 6.0])
    sigma = torch.exp(-logsnr / 2)
    assert torch.allclose(noise_condition(logsnr, "edm"), sigma.log() / 4)
    assert torch.allclose(noise_condition(logsnr, "gamma"), 1000 / (1 + sigma**2))
    angle = noise_condition(logsnr, "angle") * math.pi / 2000
    assert torch.allclose(torch.tan(angle), sigma, rtol=1e-4)


def test_the_ddpm_condition_is_close_to_ddpms_own_step_number():
    # ᾱ of DDPM's linear β schedule, 1e-4 → 0.02 in 1000 steps (Ho et al. 2020: ᾱ_499 = 0.0785872).
    alpha_bar = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)
    assert alpha_bar[499].item() == pytest.approx(0.0785872, rel=1e-5)
    steps = torch.tensor([0, 10, 100, 499, 900, 999])
    condition = noise_condition(torch.logit(alpha_bar[steps]).float(), "ddpm")
    assert (condition - (steps + 1)).abs().max() < 4.0  # of 1000: the continuous process is not quite the chain


@pytest.mark.parametrize("name", ["unet", "edm2"])
def test_it_traces_into_one_graph_and_gives_the_same(name):
    settings = {} if name == "unet" else {"noise_mult": 1}
    model = awake(name, num_classes=4, **settings)
    if name == "edm2":
        model.project_weights()
    x, logsnr = inputs()
    label = torch.tensor([0, 3, 4])
    model.train()
    expected = model(x, logsnr, label)[0]
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)(x, logsnr, label)[0]
    assert torch.allclose(compiled, expected, rtol=1e-4, atol=1e-5)
    compiled.square().mean().backward()
    assert all(p.grad is not None for n, p in model.named_parameters() if "uncertainty" not in n)


@pytest.mark.parametrize(
    ("kind", "steps", "scale", "cosine"),
    [("ddpm_index", 1000, 1.0, False), ("adm_index", 1000, 1.0, True), ("iddpm_index", 4000, 0.25, True)],
)
def test_the_steps_of_a_discrete_schedule_have_their_numbers(kind, steps, scale, cosine):
    """From the schedules of diffscale.diffusion: numbers of Ho et al. 2020 and Nichol and Dhariwal 2021."""
    from diffscale.diffusion.beta_schedules import DDPMLinear, IDDPMCosine

    schedule = (IDDPMCosine if cosine else DDPMLinear)(steps=steps)
    index = torch.arange(steps)
    logsnr = schedule.logsnr(index.double() / (steps - 1)).float()
    torch.testing.assert_close(noise_condition(logsnr, kind), index.float() * scale, rtol=0, atol=0)
    between = schedule.logsnr(torch.tensor([10.5]).double() / (steps - 1)).float()
    torch.testing.assert_close(noise_condition(between, kind), torch.tensor([10.5 * scale]), rtol=0, atol=1e-3)
    assert noise_condition(torch.empty(2, device="meta"), kind).shape == (2,)


def test_the_flows_time_is_the_share_of_the_image():
    logsnr = torch.tensor([-2 * math.log(3), 0.0])  # sigma/alpha = 3 and 1
    torch.testing.assert_close(noise_condition(logsnr, "flow"), torch.tensor([0.25, 0.5]))
    torch.testing.assert_close(noise_condition(logsnr, "flow_1000"), torch.tensor([750.0, 500.0]))


def test_ddpms_convolution_down_can_pad_at_the_end_alone():
    """TensorFlow's SAME padding of stride 2: none before an even side, one after it."""
    from diffscale.models.unet import ConvResample

    torch.manual_seed(0)
    layer, x = ConvResample(4, "down", "end"), torch.randn(2, 4, 6, 6)
    windows = F.pad(x, (0, 1, 0, 1)).unfold(2, 3, 2).unfold(3, 3, 2)  # (2, 4, 3, 3, 3, 3)
    expected = torch.einsum("bchwij,ocij->bohw", windows, layer.conv.weight) + layer.conv.bias[:, None, None]
    torch.testing.assert_close(layer(x, x), expected)
