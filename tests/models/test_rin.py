"""RIN: latent self-conditioning, the two tokens that replace latents, sizes from 32 to 1024 pixels, its own start."""

from __future__ import annotations

import pytest
import torch

from diffscale.models import create_model
from diffscale.models.layers import multi_head_attention
from diffscale.models.rin import RIN

TINY = {"resolution": 16, "patch_size": 4, "interface_width": 16, "latents": 6, "latent_width": 32, "num_blocks": 2}
TINY |= {"layers": 1, "latent_heads": 4, "rw_heads": 2}


def inputs(batch: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.randn(batch, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    return x, torch.linspace(-4, 4, batch)


def count(**settings) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in create_model(**settings).parameters())


def test_self_conditioning_starts_as_nothing_and_then_matters():
    torch.manual_seed(0)
    model = RIN(**TINY).eval()
    x, logsnr = inputs()
    with torch.no_grad():
        first, state = model(x, logsnr)
        assert state.shape == (3, 6, 32)
        assert torch.equal(model(x, logsnr, None, state)[0], first)
        assert torch.equal(model(x, logsnr, None, torch.zeros_like(state))[0], first)
        model.carry_norm.weight.fill_(1.0)
        assert not torch.allclose(model(x, logsnr, None, state)[0], model(x, logsnr)[0])


def test_no_state_is_the_state_of_zeros():
    torch.manual_seed(0)
    model = RIN(**TINY).eval()
    torch.nn.init.ones_(model.carry_norm.weight)
    x, logsnr = inputs()
    with torch.no_grad():
        assert torch.equal(model(x, logsnr)[0], model(x, logsnr, None, torch.zeros(3, 6, 32))[0])


def test_the_carried_gain_gets_a_gradient_at_the_start():
    torch.manual_seed(0)
    model = RIN(**TINY)
    x, logsnr = inputs()
    state = model(x, logsnr)[1].detach()
    model(x, logsnr, None, state)[0].square().mean().backward()
    assert model.carry_norm.weight.grad.abs().sum() > 0


def test_time_and_class_tokens_take_the_place_of_latents():
    assert RIN(**TINY).latents.shape == (5, 32)
    model = RIN(**TINY, num_classes=10)
    assert model.latents.shape == (4, 32)
    assert model.initial_latents(torch.zeros(2, 32), torch.tensor([1, 2]), None).shape == (2, 6, 32)


def test_the_network_sees_gamma_and_nothing_of_the_noise_below_it():
    model = RIN(**TINY, start="authors")
    near_noise = model.embed_time(torch.tensor([-40.0, -60.0]))  # γ·1000 < 1e-14 for both
    assert torch.allclose(near_noise[0], near_noise[1])
    assert not torch.allclose(*model.embed_time(torch.tensor([-1.0, 1.0])))


@pytest.mark.parametrize("resolution", [32, 64, 128, 256, 512, 1024])
def test_by_default_there_are_at_most_1024_interface_tokens(resolution):
    with torch.device("meta"):
        model = RIN(resolution)
        assert model.positions.shape[0] == (256 if resolution == 32 else 1024)
        x = torch.empty(1, 3, resolution, resolution)
        assert model(x, torch.empty(1))[0].shape == x.shape


def test_a_projection_starts_with_the_spread_that_keras_gives_it():
    torch.manual_seed(0)
    model = RIN(32, latent_width=512, latent_heads=16, num_blocks=1, layers=1)
    layer = model.blocks[0].process[0]
    # tf.keras MultiHeadAttention(16, 32) on width 512: kernel (512, 16, 32), fans 16·512 and 32·512
    assert layer.qkv.weight.std().item() == pytest.approx((2 / (48 * 512)) ** 0.5, rel=0.02)
    assert layer.out.weight.std().item() == pytest.approx((2 / (16 * (32 + 512))) ** 0.5, rel=0.02)
    assert model.latents.std().item() == pytest.approx(0.8796 * 0.02, rel=0.05)


def test_the_authors_start_of_time_and_stem_and_the_one_that_earlier_runs_had():
    """Keras's fans: Dense (a, b); Conv2D (p²·channels, p²·width). VarianceScaling(1, fan_avg, uniform) is Xavier."""
    torch.manual_seed(0)
    theirs, earlier = create_model("rin-cifar10", start="authors"), create_model("rin-cifar10")
    assert theirs.time1.weight.std().item() == pytest.approx((2 / (128 + 512)) ** 0.5, rel=0.02)
    assert theirs.time2.weight.std().item() == pytest.approx((2 / (512 + 512)) ** 0.5, rel=0.02)
    assert theirs.stem.weight.std().item() == pytest.approx((2 / (4 * (3 + 256))) ** 0.5, rel=0.03)
    for layer in (earlier.time1, earlier.time2):
        assert layer.weight.std().item() == pytest.approx(0.8796 * 0.02, rel=0.02)  # a normal cut at 2σ
    assert earlier.stem.weight.std().item() == pytest.approx((2 / (12 + 256)) ** 0.5, rel=0.03)


def test_the_weights_of_rin_tiny_are_those_of_the_runs_in_the_committed_tables():
    """Sums at seed 0 of the code before `start` was a setting (commit 9919b70)."""
    torch.manual_seed(0)
    found = [float(p.detach().double().abs().sum()) for p in create_model("rin-tiny").parameters()]
    assert len(found) == 178
    assert sum(found) == pytest.approx(163124.76365587, rel=1e-6)


def test_a_network_without_self_conditioning_carries_no_state():
    model = RIN(**TINY, self_conditioning=False)
    x, logsnr = inputs()
    assert not model.carries_state
    assert model(x, logsnr)[1] is None


EXCHANGE = [
    {"gated_writes": True},
    {"time_on_tiles": True},
    {"tile_conv": 3},
    {"rw_positions": True},
    {"qk_norm": True},
    {"write_heads": 8},
    {"late_latents": 3},
]


@pytest.mark.parametrize("settings", EXCHANGE[:3], ids=str)
def test_gates_time_and_convolutions_of_the_tiles_start_as_nothing_and_then_matter(settings):
    torch.manual_seed(0)
    plain, more = RIN(**TINY, start="authors").eval(), RIN(**TINY, **settings, start="authors").eval()
    added = [p for name, p in more.named_parameters() if name not in dict(plain.named_parameters())]
    assert more.load_state_dict(plain.state_dict(), strict=False).unexpected_keys == []
    x, logsnr = inputs()
    with torch.no_grad():
        torch.testing.assert_close(more(x, logsnr)[0], plain(x, logsnr)[0])
        for parameter in added:
            parameter += 0.1 * torch.randn_like(parameter)
        assert not torch.allclose(more(x, logsnr)[0], plain(x, logsnr)[0], atol=1e-3)


@pytest.mark.parametrize("settings", EXCHANGE[3:], ids=str)
def test_positions_heads_and_late_latents_change_the_output_and_not_the_state(settings):
    torch.manual_seed(0)
    plain, more = RIN(**TINY).eval(), RIN(**TINY, **settings).eval()
    more.load_state_dict(plain.state_dict(), strict=False)
    x, logsnr = inputs()
    with torch.no_grad():
        (first, state), (second, other) = plain(x, logsnr), more(x, logsnr)
    assert other.shape == state.shape
    assert not torch.equal(first, second)


def test_with_zero_writes_the_tiles_begin_untouched_by_the_latents():
    torch.manual_seed(0)
    model = RIN(**TINY, zero_writes=True, self_conditioning=False, start="authors").eval()
    x, logsnr = inputs()
    other = x.clone()
    other[:, :, 8:] = 0  # the lower half
    with torch.no_grad():
        assert torch.equal(model(x, logsnr)[0][:, :, :8], model(other, logsnr)[0][:, :, :8])
        torch.nn.init.normal_(model.blocks[0].write.out.weight)
        assert not torch.equal(model(x, logsnr)[0][:, :, :8], model(other, logsnr)[0][:, :, :8])


def test_a_read_asks_for_places_where_positions_join_the_keys():
    """Tiles of one content: without positions every latent gathers the same from any order of them."""
    torch.manual_seed(0)
    attention = RIN(**TINY).blocks[0].read
    latents, tiles = torch.randn(1, 6, 32), torch.randn(1, 1, 16).expand(1, 16, 16)
    positions = torch.randn(16, 16)
    torch.testing.assert_close(attention(latents, tiles, y_positions=positions), attention(latents, tiles))
    tiles = torch.randn(1, 16, 16)
    keys = attention.kv(tiles + positions)[..., :16]
    values = attention.kv(tiles)[..., 16:]
    expected = latents + attention.out(multi_head_attention(attention.q(attention.norm(latents)), keys, values, 2))
    torch.testing.assert_close(attention(latents, tiles, y_positions=positions), attention.mlp(expected))


def test_zero_output_starts_at_zero():
    x, logsnr = inputs()
    assert RIN(**TINY, zero_output=True)(x, logsnr)[0].abs().max() == 0
    assert RIN(**TINY)(x, logsnr)[0].abs().max() > 0


def test_parameters_of_the_released_configurations():
    """Summed by hand from the layers of google-research/pix2seq (architectures/tape.py, transformers.py)."""

    def dense(a: int, b: int) -> int:
        return a * b + b

    def mlp(d: int, ratio: int) -> int:
        return 2 * d + dense(d, ratio * d) + dense(ratio * d, d)

    def cross(d: int, source: int, ratio: int) -> int:
        inner = min(d, source)
        return 2 * d + dense(d, inner) + 2 * dense(source, inner) + dense(inner, d) + mlp(d, ratio)

    def rin(side: int, classes: int, p: int, tape: int, tape_ratio: int, slots: int, d: int, layers: list[int]) -> int:
        stem = dense(3 * p * p, tape) + 2 * tape + (side // p) ** 2 * tape
        latents = (slots - 2) * d + dense(d // 4, d) + dense(d, d) + dense(classes, d) + mlp(d, 4) + 2 * d
        self_attention = 2 * d + 4 * dense(d, d) + mlp(d, 4)
        blocks = sum(cross(d, tape, 4) + n * self_attention + cross(tape, d, tape_ratio) for n in layers)
        return stem + latents + blocks + 2 * tape + dense(tape, 3 * p * p)

    assert count(name="rin-cifar10") == rin(32, 10, 2, 256, 2, 128, 512, [2, 2, 2])
    assert count(name="rin-imagenet64") == rin(64, 1000, 8, 512, 4, 128, 768, [4, 4, 4, 4])
