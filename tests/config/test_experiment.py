"""What a run is (`run_id`) and what is only where, how long and how it is looked at."""

from __future__ import annotations

import pytest

from diffscale.config.load import load_experiment

SAME = [
    "name=other",
    "storage=/elsewhere",
    "train.workers=4",
    "train.micro_batch=8",
    "train.flops=9e15",
    "train.price_per_device_hour=3",
    "eval.n_generated=7",
    "eval.solver.steps=3",
    "train.trackers=[]",
    "train.checkpoint.keep_last=9",
    "train.max_failures=0",
]
DIFFERENT = [
    "train.seed=1",
    "train.global_batch=48",
    "optim.lr=1e-5",
    "diffusion.prediction=eps",
    "train.precision=fp32",
    "data.flip=false",
    "data.resolution=24",
    "model.name=rin",
    "train.ema.halflife_fraction=0.2",
    "train.compile=false",
    "diffusion.schedule=ddpm_linear",
    "data.class_conditional=false",
]

PINNED = {
    "emoji-dit train.precision=fp32": "d6f414740f3d53fb",
    "emoji-rin train.precision=fp32": "3afcaee91c219a18",
    "emoji-unet train.precision=fp32": "cdc49b27dcf27dde",
    "emoji-uvit train.precision=fp32": "755c785d932ef957",
    "quickstart-rin train.precision=fp32": "2de041f41a78c60e",
    "quickstart-unet train.precision=fp32": "a72526067148f5d2",
    "quickstart-uvit train.precision=fp32": "b545c2d792649b16",
    "quickstart-unet model.name=unet": "885c3a5ca19cc925",
    "quickstart-unet model.name=edm2": "9e16fa7e5246af79",
    "quickstart-unet model.name=uvit": "b519a039f441d38e",
    "quickstart-unet model.name=rin": "3335267fda504bea",
    "quickstart-unet model.name=dit": "64ccabf8a870cdd3",
    "quickstart-unet model.name=jit": "0659cd63b6e25663",
    "quickstart-unet model.name=hdit": "15423b9c5c8a2e19",
    "quickstart-unet diffusion.schedule=ddpm_linear": "80f214a6f95b0833",
    "quickstart-unet diffusion.schedule=iddpm_cosine": "888f758d8863002f",
    "quickstart-unet diffusion.schedule=linear_gamma": "b2a734da615a86df",
    "quickstart-unet diffusion.schedule=cosine_gamma": "61b0215ab2f2335f",
    "quickstart-unet diffusion.schedule=sigmoid_gamma": "8329aacfd056ea9a",
    "quickstart-unet diffusion.schedule=offset_cosine_gamma": "49aaf817c634e8e6",
    "quickstart-unet diffusion.schedule=simple_cosine": "885c3a5ca19cc925",
    "quickstart-unet diffusion.schedule=edm_lognormal": "9e86134b61b9bd0a",
    "quickstart-unet diffusion.schedule=flow_uniform": "a954299fce9e2cfa",
    "quickstart-unet diffusion.schedule=flow_logit_normal": "e4452397296c6db2",
    "quickstart-unet diffusion.weighting=uniform_eps": "d47280e341ccd662",
    "quickstart-unet diffusion.weighting=uniform_x0": "747b73e8dda2e5a7",
    "quickstart-unet diffusion.weighting=uniform_v": "1fbe61da6330d7fb",
    "quickstart-unet diffusion.weighting=uniform_u": "8d6188d87a47c561",
    "quickstart-unet diffusion.weighting=min_snr": "885c3a5ca19cc925",
    "quickstart-unet diffusion.weighting=soft_min_snr": "9e3a76a52907d4ea",
    "quickstart-unet diffusion.weighting=p2": "afa78bf3bc3492b3",
    "quickstart-unet diffusion.weighting=edm": "ae8a04dbb31feb58",
    "quickstart-unet diffusion.weighting=sigmoid": "2e6b56eefeabb7ae",
}
"""Identities computed before settings had ranges: a run keeps its folder."""


@pytest.mark.parametrize(("arguments", "expected"), PINNED.items())
def test_a_run_keeps_its_identity(arguments: str, expected: str) -> None:
    preset, *overrides = arguments.split()
    assert load_experiment(preset, overrides).run_id("d") == expected


@pytest.mark.parametrize("override", SAME)
def test_the_same_weights_are_the_same_run(override: str) -> None:
    assert load_experiment("quickstart-unet", [override]).run_id("d") == load_experiment("quickstart-unet").run_id("d")


@pytest.mark.parametrize("override", DIFFERENT)
def test_other_weights_are_another_run(override: str) -> None:
    assert load_experiment("quickstart-unet", [override]).run_id("d") != load_experiment("quickstart-unet").run_id("d")


@pytest.mark.parametrize(
    ("preset", "overrides", "run_id"),
    [
        ("quickstart-unet", [], "885c3a5ca19cc925"),
        ("quickstart-rin", [], "11d7b34a0d1129bf"),
        ("emoji-rin", [], "443b697679552a77"),
        ("emoji-rin", ["optim.name=lamb", "optim.weight_decay=0.01"], "032810639fe88f5a"),
        ("emoji-rin", ["diffusion.self_condition=0"], "d22dc648e1157aee"),
        ("emoji-dit", ["optim.name=muon"], "9b2db1322dd2431e"),
    ],
)
def test_runs_keep_the_identity_that_commit_9919b70_gave_them(preset: str, overrides: list[str], run_id: str) -> None:
    assert load_experiment(preset, overrides).run_id("d") == run_id


def test_other_data_is_another_run() -> None:
    e = load_experiment("quickstart-unet")
    assert e.run_id("a") != e.run_id("b")


def test_the_length_is_part_of_a_run_only_where_the_learning_rate_depends_on_it() -> None:
    def run_id(*overrides: str) -> str:
        return load_experiment("quickstart-unet", overrides).run_id("d")

    assert run_id("train.images=100") == run_id("train.images=200")
    cosine = "optim.schedule=cosine"
    assert run_id("train.images=100", cosine) != run_id("train.images=200", cosine)
    decay = "optim.decay_images=50"
    assert run_id("train.images=100", decay) != run_id("train.images=200", decay)


def test_an_endpoint_says_what_the_learning_rate_was_doing() -> None:
    constant = load_experiment("quickstart-unet")
    assert constant.endpoint(10) == "constant"
    decay = load_experiment("quickstart-unet", ["train.images=100", "optim.decay_images=20"])
    assert [decay.endpoint(n) for n in (50, 90, 100)] == ["constant", "mid_decay", "decayed"]
    cosine = load_experiment("quickstart-unet", ["train.images=100", "optim.schedule=cosine"])
    assert [cosine.endpoint(n) for n in (50, 100)] == ["mid_decay", "decayed"]


def test_settings_come_back_from_their_own_dump() -> None:
    from diffscale.config.experiment import Experiment

    e = load_experiment("quickstart-rin")
    assert Experiment.model_validate(e.model_dump(mode="json")) == e
    assert e.dotted()["train.ema.halflife_fraction"] == e.train.ema.halflife_fraction


def test_workers_and_classes_have_one_reading() -> None:
    e = load_experiment("quickstart-unet", ["train.workers=3"])
    assert (e.train.min_workers, e.train.max_workers) == (3, 3)
    e = load_experiment("quickstart-unet", ["train.workers=[2, 4]"])
    assert (e.train.min_workers, e.train.max_workers) == (2, 4)

    class Ten:
        num_classes = 10

    assert e.num_classes(Ten()) == 10
    assert load_experiment("quickstart-unet", ["data.class_conditional=false"]).num_classes(Ten()) == 0
