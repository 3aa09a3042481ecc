"""How a run computes: a rule, not a measurement; stored with the run, without side effects on the model."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch._dynamo.utils import counters

from diffscale.config.load import load_experiment
from diffscale.core.errors import UserError
from diffscale.data import Dataset
from diffscale.kernels.runtime import exact_float32, exact_on_gpu, why_not_compiled
from diffscale.kernels.winograd import FLOAT32
from diffscale.models import create_model
from diffscale.training.compile_rules import Rule, compiled_from
from diffscale.training.numerics import (
    Numerics,
    choose_numerics,
    compile_blocks,
    multiplies_bf16,
    settle_numerics,
    settled,
    usable,
)
from diffscale.training.parallel import World

from .small import SETTINGS, experiment

needs_compiler = pytest.mark.skipif(not FLOAT32.available, reason="no C++ compiler on this machine")
NETWORKS_OF_CONVOLUTIONS = {"unet", "edm2", "uvit"}


@dataclass(frozen=True)
class Asked:
    precision: str = "auto"
    channels_last: bool | str = "auto"
    compile: bool | str = "auto"
    winograd: bool | str = "auto"
    exact: bool = True
    reduce_precision: str = "fp32"


@pytest.fixture
def model():
    torch.manual_seed(0)
    return create_model("edm2-tiny", dropout=0.1, model_channels=16, channels_per_head=16)


def tiny(name: str) -> torch.nn.Module:
    with torch.device("meta"):
        return create_model(f"{name}-tiny")


def test_requested_numerics_are_used(model):
    for asked in (True, False):
        for device in ("cpu", "cuda"):
            chosen = choose_numerics(model, device, Asked("fp32", asked, asked, asked))
            assert chosen == Numerics("fp32", asked, asked, asked)


@needs_compiler
@pytest.mark.parametrize("name", ["unet", "edm2", "uvit", "rin", "dit", "jit", "hdit"])
def test_on_a_cpu_networks_of_convolutions_use_winograd_in_channels_last_order(name):
    convolves = name in NETWORKS_OF_CONVOLUTIONS
    chosen = choose_numerics(tiny(name), "cpu", Asked(), bf16=False)
    assert chosen == Numerics("fp32", channels_last=convolves, winograd=convolves)
    assert choose_numerics(tiny(name), "cpu", Asked(channels_last=True), bf16=False).winograd is False


@pytest.mark.parametrize("name", ["unet", "edm2", "uvit", "rin", "dit", "jit", "hdit"])
def test_on_a_gpu_networks_of_convolutions_are_channels_last_in_low_precision(name):
    convolves = name in NETWORKS_OF_CONVOLUTIONS
    assert choose_numerics(tiny(name), "cuda", Asked(), bf16=True) == Numerics("bf16", channels_last=convolves)
    assert choose_numerics(tiny(name), "cuda", Asked(), bf16=False) == Numerics("fp32")  # older than Ampere


def test_large_networks_are_compiled_on_a_gpu_alone():
    with torch.device("meta"):
        large = create_model("dit-b-4", resolution=64, channels=3, num_classes=0)
    assert choose_numerics(large, "cuda", Asked(), bf16=True).compile is True
    assert choose_numerics(large, "cpu", Asked(), bf16=True).compile is False
    assert choose_numerics(tiny("dit"), "cuda", Asked(), bf16=True).compile is False


def test_a_gpus_own_rule_for_a_backbone_comes_before_the_general_ones():
    rules = [
        Rule("cuda", "any", 20, ""),
        Rule("cuda", "unet", 30, ""),
        Rule("H200", "any", 40, "2026-11-29"),
        Rule("H200", "dit", None, "2026-11-29"),
    ]
    assert compiled_from("NVIDIA H200", "dit", rules) is None
    assert compiled_from("H200", "unet", rules) == 40
    assert compiled_from("H100", "unet", rules) == 30
    assert compiled_from("", "dit", rules) == 20
    assert compiled_from("H100", "dit", rules[2:]) is None


def test_auto_precision_follows_the_processors_instructions():
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    assert multiplies_bf16("cpu") is any(flag in flags for flag in ("avx512_bf16", "amx_bf16", " bf16"))
    assert multiplies_bf16("cuda") is False or torch.cuda.is_available()


def test_settled_settings_say_how_the_run_computes_and_give_it_its_identity(shared_storage: Path, dataset: Dataset):
    e = load_experiment("quickstart-unet", [f"storage={shared_storage}", "data.resolution=8"])
    same = settled(e, dataset)
    assert "auto" not in {same.train.precision, same.train.compile, same.train.channels_last, same.train.winograd}
    assert settled(same, dataset) == same
    explicit = [f"train.{key}={json.dumps(getattr(same.train, key))}" for key in dataclasses.asdict(Numerics())]
    given = load_experiment("quickstart-unet", [f"storage={shared_storage}", "data.resolution=8", *explicit])
    assert given.run_id("d") == same.run_id("d")  # the same run, whether chosen or set
    other = "fp32" if same.train.precision == "bf16" else "bf16"
    ids = {
        choice.run_id("d")
        for choice in (
            same,
            load_experiment("quickstart-unet", [*explicit, "data.resolution=8", f"train.precision={other}"]),
            load_experiment("quickstart-unet", [*explicit, "data.resolution=8", "train.channels_last=false"]),
            load_experiment("quickstart-unet", [*explicit, "data.resolution=8", "train.compile=true"]),
        )
    }
    assert len(ids) == 4


def test_the_identity_of_runs_with_given_numerics_is_that_of_earlier_versions():
    """Figures of commit 3316457, before winograd was a setting."""
    given = ["train.precision=fp32", "train.compile=false", "train.channels_last=false", "storage=/s"]
    assert load_experiment("quickstart-unet", given).run_id("d") == "cf995ea3a0242560"
    winograd = load_experiment("quickstart-unet", [*given[:2], "train.channels_last=true", "train.winograd=true"])
    plain = load_experiment("quickstart-unet", [*given[:2], "train.channels_last=true", "train.winograd=false"])
    assert winograd.run_id("d") != plain.run_id("d")


def test_the_precision_in_which_gradients_are_summed_is_part_of_the_identity_where_it_is_not_float32():
    given = ["train.precision=fp32", "train.compile=false", "train.channels_last=false", "storage=/s"]
    ids = [
        load_experiment("quickstart-unet", [*given, f"train.reduce_precision={precision}"]).run_id("d")
        for precision in ("fp32", "bf16")
    ]
    assert ids[0] == load_experiment("quickstart-unet", given).run_id("d") != ids[1]


def test_a_run_from_when_auto_was_measured_keeps_what_was_chosen(tmp_path: Path, dataset: Dataset):
    from diffscale.config.load import validate

    e = validate(SETTINGS | {"name": "old", "storage": str(tmp_path)})
    folder = Path(e.run_folder(dataset.content_hash))
    folder.mkdir(parents=True)
    numerics = {"precision": "fp32", "channels_last": True, "compile": False, "winograd": False}
    stored = {"numerics": numerics, "device": "some CPU", "bit_identical": True}
    (folder / "numerics.json").write_text(json.dumps(stored))
    assert settled(e, dataset) == e
    read, bit_identical = settle_numerics(e, str(folder), dataset, World())
    assert dataclasses.asdict(read) == numerics | {
        "exact": True,
        "reduce_precision": "fp32",
    }  # came later
    assert not bit_identical  # it began on another device


def test_winograd_that_the_device_does_not_have_is_refused(tmp_path: Path, dataset: Dataset):
    e = experiment(tmp_path, train={"precision": "fp16", "winograd": True})
    with pytest.raises(UserError, match=r"train\.winograd"):
        settle_numerics(e, str(tmp_path), dataset, World())


def test_exactness_is_the_default_and_giving_it_up_is_another_run(tmp_path: Path, dataset: Dataset):
    """With train.exact at its default a run has the run_id that it had before the setting existed."""
    given = ["train.precision=fp32", "train.compile=false", "train.channels_last=false", "storage=/s"]
    ids = {e: load_experiment("quickstart-unet", [*given, f"train.exact={e}"]).run_id("d") for e in ("true", "false")}
    assert ids["true"] == "cf995ea3a0242560" != ids["false"]
    fast = experiment(tmp_path, train={"exact": False})
    settle_numerics(fast, str(tmp_path), dataset, World())
    assert Numerics.load(str(tmp_path)).exact is False
    stored = json.loads((tmp_path / "numerics.json").read_text())
    assert stored["bit_identical"] is True  # exactness is about GPUs: a CPU's sums have one order


@pytest.mark.parametrize("exact", [True, False])
def test_an_exact_run_takes_no_algorithm_whose_order_of_sums_is_open(exact, monkeypatch: pytest.MonkeyPatch):
    """The switches that PyTorch documents for reproducible results; cuDNN's attention has no deterministic gradient."""
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    try:
        exact_on_gpu(exact)
        assert torch.are_deterministic_algorithms_enabled() is exact
        assert torch.backends.cudnn.deterministic is exact
        assert torch.backends.cudnn.benchmark is not exact
        assert torch.backends.cuda.cudnn_sdp_enabled() is not exact
        assert ("CUBLAS_WORKSPACE_CONFIG" in os.environ) is exact
        assert torch.utils.deterministic.fill_uninitialized_memory is False
    finally:
        exact_on_gpu(False)
        torch.backends.cudnn.benchmark = False


def spied(events: list[str]) -> Callable[..., Any]:
    """A backend of torch.compile that notes each product of a backward pass when it runs."""
    from functorch.compile import make_boxed_func
    from torch._dynamo.backends.common import aot_autograd

    class Noting(torch.fx.Interpreter):
        def run_node(self, node: torch.fx.Node) -> Any:
            if "mm" in str(node.target):
                events.append("product")
            return super().run_node(node)

    def backward(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        return make_boxed_func(lambda *arguments: Noting(graph).run(*arguments))

    return aot_autograd(fw_compiler=lambda graph, inputs: make_boxed_func(graph.forward), bw_compiler=backward)


def test_compiled_blocks_leave_their_gradients_while_the_backward_pass_goes_on():
    """Else the sum over the workers would begin when nothing is left to compute: 15 ms of a step of DiT-XL/2."""
    model = create_model("dit", resolution=8, width=16, depth=3, num_heads=2)
    torch._dynamo.reset()
    counters.clear()
    events: list[str] = []
    for i, block in enumerate(model.blocks):
        block.out.weight.register_post_accumulate_grad_hook(lambda _, i=i: events.append(f"gradient of {i}"))
    compile_blocks(model, spied(events))
    model(torch.randn(2, 3, 8, 8), torch.zeros(2))[0].sum().backward()
    between = [events[events.index(f"gradient of {i}") : events.index(f"gradient of {i - 1}")] for i in (2, 1)]
    assert all("product" in part for part in between)
    assert counters["stats"]["unique_graphs"] == 1  # equal blocks are compiled once


@pytest.mark.parametrize("name", ["unet", "rin", "hdit"])
def test_every_block_of_every_shape_is_compiled_whole(name):
    """A graph break raises (fullgraph), and so does a limit on recompilations that is too low for a UNet's shapes."""
    model, eager = (create_model(f"{name}-tiny") for _ in range(2))
    eager.load_state_dict(model.state_dict())
    torch._dynamo.reset()
    counters.clear()
    compile_blocks(model, "eager")
    x, logsnr = torch.randn(2, 3, 32, 32), torch.zeros(2)
    got = model(x, logsnr)[0]
    got.square().sum().backward()
    assert torch.equal(got, eager(x, logsnr)[0])
    compiled = counters["stats"]["unique_graphs"]
    model(x, logsnr)
    assert 0 < compiled == counters["stats"]["unique_graphs"] <= len(model.blocks_for_fsdp())


def test_a_machine_that_cannot_compile_trains_without_and_says_so_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setattr("torch._inductor.config.cpp.cxx", ("/no/compiler",))
    monkeypatch.setattr("torch._inductor.config.force_disable_caches", True)
    why_not_compiled.cache_clear()
    torch._dynamo.reset()
    wanted = Numerics(compile=True)
    assert usable(wanted, World()) == Numerics(compile=False)
    assert usable(Numerics(), World()) == Numerics()
    said = [record.message for record in caplog.records if "the run is not compiled" in record.message]
    assert len(said) == 1
    assert "/no/compiler" in said[0]
    why_not_compiled.cache_clear()


def test_choices_survive_storage():
    chosen = choose_numerics(tiny("unet"), "cpu", Asked())
    assert Numerics(**json.loads(json.dumps(dataclasses.asdict(chosen)))) == chosen
    assert yaml.safe_load(yaml.safe_dump(dataclasses.asdict(chosen))) == dataclasses.asdict(chosen)


def test_choosing_leaves_weights_gradients_mode_and_random_state_alone(model):
    model.eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    model.conv_in.weight.grad = torch.ones_like(model.conv_in.weight)
    state = torch.get_rng_state()
    choose_numerics(model, "cpu", Asked())
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

    assert choose_numerics(Linear(), "cpu", Asked()).channels_last is False


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
