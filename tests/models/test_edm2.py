"""EDM2: magnitudes are preserved, weights keep their norm, the output starts at zero."""

from __future__ import annotations

import math

import pytest
import torch

from diffscale.models import create_model
from diffscale.models.edm2 import EDM2, MPFourier, MPWeight, mp_concat, mp_silu, mp_sum, rescale

TINY = {"resolution": 16, "model_channels": 16, "channel_mult": (1, 2), "num_blocks": 1, "attn_resolutions": (8,)}
TINY |= {"channels_per_head": 16, "num_classes": 4}


def awake(**settings) -> EDM2:
    """A network whose gains are not zero."""
    torch.manual_seed(0)
    model = create_model("edm2", **(TINY | settings))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 0:
                parameter.fill_(0.7)
    return model.eval()


def inputs(batch: int = 3, height: int = 16, width: int = 16) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, 3, height, width, generator=generator), torch.linspace(-4, 4, batch), torch.arange(batch)


def rms(x: torch.Tensor) -> float:
    return x.double().square().mean().sqrt().item()


def test_the_output_starts_at_exactly_zero_and_the_embedding_without_effect():
    torch.manual_seed(0)
    model = EDM2(**TINY).eval()
    x, logsnr, label = inputs()
    assert torch.equal(model(x, logsnr, label)[0], torch.zeros_like(x))
    with torch.no_grad():
        model.out_gain.fill_(1.0)
    assert torch.equal(model(x, logsnr, label)[0], model(x, logsnr + 3, label.flip(0))[0])


def test_each_layer_preserves_the_magnitude_of_unit_variance_inputs():
    torch.manual_seed(0)
    a, b = torch.randn(16, 64, 16, 16), torch.randn(16, 32, 16, 16)
    assert rms(mp_silu(a)) == pytest.approx(1, abs=0.01)
    assert rms(mp_sum(a, torch.randn_like(a), 0.3)) == pytest.approx(1, abs=0.01)
    assert rms(rescale(7 * a, 1)) == pytest.approx(1, abs=0.01)
    assert rms(MPFourier(4096)(torch.linspace(-1, 1, 64))) == pytest.approx(1, abs=0.02)
    assert rms(MPWeight(64, 256, 1)(a)) == pytest.approx(1, abs=0.03)
    assert rms(MPWeight(64, 256)(torch.randn(512, 64))) == pytest.approx(1, abs=0.03)
    assert rms(MPWeight(64, 256, 3)(a)[:, :, 1:-1, 1:-1]) == pytest.approx(1, abs=0.03)
    assert rms(mp_concat(a, b, 0.5)) == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize("weight", [0.3, 0.5])
def test_concatenation_gives_each_input_its_share_whatever_its_width(weight):
    torch.manual_seed(0)
    both = mp_concat(torch.randn(8, 96, 8, 8), torch.randn(8, 32, 8, 8), weight)
    first, second = both[:, :96].square().sum().sqrt(), both[:, 96:].square().sum().sqrt()
    assert (second / first).item() == pytest.approx(weight / (1 - weight), rel=0.02)


def test_activations_stay_at_unit_magnitude_through_the_network():
    model, seen = awake(channel_mult=(1, 2, 3), num_blocks=2), []
    for block in model.blocks_for_fsdp():
        block.register_forward_hook(lambda module, args, out: seen.append(rms(out)))
    with torch.no_grad():
        model(*inputs(8))
    assert all(0.5 < value < 2 for value in seen), seen


def test_training_keeps_every_filter_at_unit_magnitude_and_evaluation_touches_nothing():
    model = awake()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, MPWeight):
                module.weight.mul_(3.0)
    before = {n: p.clone() for n, p in model.named_parameters()}
    evaluated = model(*inputs())[0]
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    model.train()
    trained = model(*inputs())[0]
    assert torch.allclose(trained, evaluated, rtol=1e-3, atol=1e-3)  # the scale of a weight has no effect
    for module in model.modules():
        if isinstance(module, MPWeight):
            filters = module.weight.flatten(1).square().mean(1).sqrt()
            assert torch.allclose(filters, torch.ones_like(filters), atol=1e-3)


def test_gradients_reach_every_parameter_the_uncertainty_head_included():
    model = awake().train()
    x, logsnr, label = inputs()
    loss = model(x, logsnr, label)[0].square().mean() + model.uncertainty(logsnr).square().sum()
    loss.backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0] == []


def test_two_training_passes_before_one_backward_pass_are_allowed():
    model = awake().train()
    (model(*inputs())[0].square().mean() + model(*inputs())[0].square().mean()).backward()
    assert all(p.grad.isfinite().all() for n, p in model.named_parameters() if "uncertainty" not in n)


def test_a_batch_gives_the_same_as_its_images_one_by_one():
    model, (x, logsnr, label) = awake(), inputs()
    with torch.no_grad():
        together = model(x, logsnr, label)[0]
        alone = torch.cat([model(x[i : i + 1], logsnr[i : i + 1], label[i : i + 1])[0] for i in range(3)])
    assert (together - alone).abs().max() <= 2e-5 * together.abs().max()


def test_label_and_noise_level_change_the_output():
    model, (x, logsnr, label) = awake(), inputs()
    with torch.no_grad():
        reference = model(x, logsnr, label)[0]
        assert (model(x, logsnr, label + 1)[0] - reference).abs().amax((1, 2, 3)).min() > 1e-4
        assert (model(x, logsnr + 1, label)[0] - reference).abs().amax((1, 2, 3)).min() > 1e-4
        assert torch.equal(model(x, logsnr)[0], model(x, logsnr, torch.full((3,), 4))[0])


@pytest.mark.parametrize("size", [(16, 16), (15, 17), (9, 24), (1, 3)])
def test_any_size_in_is_the_same_size_out(size):
    x, logsnr, label = inputs(2, *size)
    with torch.no_grad():
        assert awake(channel_mult=(1, 1, 2))(x, logsnr, label)[0].shape == x.shape


def test_activation_checkpointing_changes_neither_output_nor_gradient():
    model, gradients = awake(dropout=0.3).train(), []
    model.project_weights()
    for enabled in (False, True):
        model.set_activation_checkpointing(enabled)
        model.zero_grad()
        torch.manual_seed(3)
        model(*inputs())[0].square().mean().backward()
        gradients.append([p.grad.clone() for n, p in model.named_parameters() if "uncertainty" not in n])
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-7) for a, b in zip(*gradients, strict=True))


def test_the_uncertainty_is_one_number_per_noise_level():
    model = awake()
    u = model.uncertainty(torch.tensor([-4.0, 0.0, 4.0]))
    assert u.shape == (3,)
    assert len(set(u.tolist())) == 3


def test_no_parameter_is_to_decay():
    model = awake()
    assert model.no_weight_decay() == {n for n, _ in model.named_parameters()}


def test_settings_that_cannot_be_are_refused_by_name():
    with pytest.raises(ValueError, match="num_blocks"):
        create_model("edm2", **(TINY | {"num_blocks": 0}))
    with pytest.raises(ValueError, match="channels_per_head"):
        create_model("edm2", **(TINY | {"channels_per_head": 10}))


def test_silu_divisor_is_its_root_mean_square_on_normal_inputs():
    # eq. 81: 0.596 by quadrature of silu(x)² under the normal density
    x = torch.linspace(-12, 12, 200_001, dtype=torch.float64)
    density = torch.exp(-x * x / 2) / math.sqrt(2 * math.pi)
    assert math.sqrt(torch.trapezoid(torch.nn.functional.silu(x) ** 2 * density, x)) == pytest.approx(0.596, abs=5e-4)
