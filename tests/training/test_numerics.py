"""The automatic choice of precision, memory format and compilation: made once, stored, without side effects."""

from __future__ import annotations

import dataclasses
import json
import time
from dataclasses import dataclass

import pytest
import torch

from diffscale.float32 import exact_float32
from diffscale.models import create_model
from diffscale.models.winograd import FLOAT32
from diffscale.training import numerics
from diffscale.training.numerics import Numerics, choose_numerics, settle_precision


@dataclass(frozen=True)
class Wanted:
    precision: str = "auto"
    channels_last: bool | str = "auto"
    compile: bool | str = "auto"


@pytest.fixture
def model():
    torch.manual_seed(0)
    return create_model("edm2-tiny", dropout=0.1, model_channels=16, channels_per_head=16)


def test_what_is_asked_for_is_what_is_used(model):
    images = torch.randn(2, 3, 8, 8)
    for asked in (True, False):
        chosen = choose_numerics(model, images, "cpu", Wanted("fp32", asked, asked))
        assert chosen == Numerics("fp32", asked, asked)


def test_auto_settles_every_choice_and_survives_storage(model):
    chosen = choose_numerics(model, torch.randn(2, 3, 8, 8), "cpu", Wanted(), steps=10)
    assert isinstance(chosen.channels_last, bool)
    assert chosen.compile is False
    assert Numerics(**json.loads(json.dumps(dataclasses.asdict(chosen)))) == chosen


needs_compiler = pytest.mark.skipif(not FLOAT32.available, reason="no C++ compiler on this machine")


@needs_compiler
def test_a_long_run_of_a_transformer_is_compiled_and_a_short_one_not():
    dit, images = create_model("dit-tiny", resolution=8, patch_size=4), torch.randn(2, 3, 8, 8)
    for steps, compiled in ((None, True), (10**9, True), (1000, False)):
        assert choose_numerics(dit, images, "cpu", Wanted("fp32"), steps=steps).compile is compiled


@needs_compiler
@pytest.mark.parametrize(
    ("name", "steps", "compiled"), [("unet", None, False), ("uvit", None, True), ("uvit", 99, False)]
)
def test_beside_winograd_only_transformers_are_compiled(monkeypatch, name, steps, compiled):
    monkeypatch.setattr(numerics, "_step_seconds", lambda *given: 0.1 if given[3].winograd else 1.0)
    model, images = create_model(f"{name}-tiny", resolution=8), torch.randn(2, 3, 8, 8)
    chosen = choose_numerics(model, images, "cpu", Wanted("fp32"), steps=steps)
    assert chosen == Numerics("fp32", channels_last=True, winograd=True, compile=compiled)


def test_automatic_precision_is_the_faster_one_and_a_given_one_stays():
    assert settle_precision("fp16", "cpu") == "fp16"
    chosen = settle_precision("auto", "cpu")
    layer, x = torch.nn.Linear(512, 512), torch.randn(256, 512)
    seconds = {}
    for precision in ("fp32", "bf16"):
        times = []
        for _ in range(4):
            start = time.perf_counter()
            with Numerics(precision).autocast("cpu"), torch.no_grad():
                layer(x)
            times.append(time.perf_counter() - start)
        seconds[precision] = min(times)
    assert seconds[chosen] < 1.5 * min(seconds.values())  # another product than the one that decided


def test_choosing_leaves_weights_gradients_mode_and_random_state_alone(model):
    model.eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    model.conv_in.weight.grad = torch.ones_like(model.conv_in.weight)
    state = torch.get_rng_state()
    choose_numerics(model, torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)), "cpu", Wanted())
    assert torch.equal(torch.get_rng_state(), state)
    assert not model.training
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert torch.equal(model.conv_in.weight.grad, torch.ones_like(model.conv_in.weight))
    assert model.conv_out.weight.grad is None


def test_a_model_without_convolutions_is_left_contiguous():
    class Linear(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(8, 8)

        def forward(self, x, logsnr, label=None, state=None):
            return self.layer(x), None

    assert choose_numerics(Linear(), torch.randn(2, 3, 8, 8), "cpu", Wanted()).channels_last is False


def test_float32_is_rounded_to_tf32_only_in_a_run_that_asks_for_it_and_never_inside_exact_float32(model):
    backends = torch.backends.cuda.matmul, torch.backends.cudnn
    for precision, allowed in (("tf32", True), ("fp32", False), ("bf16", False)):
        Numerics(precision).prepare(model)
        assert [backend.allow_tf32 for backend in backends] == [allowed, allowed]
        with exact_float32():
            assert [backend.allow_tf32 for backend in backends] == [False, False]
        assert [backend.allow_tf32 for backend in backends] == [allowed, allowed]


def test_prepare_and_order_put_weights_and_images_in_the_chosen_order(model):
    images = torch.randn(2, 3, 8, 8)
    unet = create_model("unet-tiny")
    for flag in (True, False):
        numerics = Numerics("bf16", channels_last=flag)
        assert numerics.prepare(unet) is unet
        last = {"memory_format": torch.channels_last}
        assert unet.encoder[0].conv1.weight.is_contiguous(**last) is flag
        assert numerics.order(images).is_contiguous(**last) is flag
    with numerics.autocast("cpu"):
        assert torch.mm(torch.ones(2, 2), torch.ones(2, 2)).dtype == torch.bfloat16
    with Numerics("fp32").autocast("cpu"):
        assert torch.mm(torch.ones(2, 2), torch.ones(2, 2)).dtype == torch.float32
