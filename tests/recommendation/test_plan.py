"""The plan of a recommendation and what is refused before anything runs."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path

import pytest

from diffscale.core.errors import UserError
from diffscale.data.build.build import BuildOptions, build
from diffscale.models import create_model
from diffscale.models.families import FAMILIES, RUNGS, TRANSFORMERS, smallest
from diffscale.models.tokens import narrow_tokens
from diffscale.recommendation.command_line import make_request
from diffscale.recommendation.plan import LATER_SIZES, alternatives, make_plan, window
from diffscale.recommendation.request import Request
from diffscale.recommendation.search import further_rate
from tests.support.datasets import pictures, png
from tests.support.sources import write_folder

SMALL = {"data": {"resolution": 16}, "train": {"global_batch": 8}, "backbones": ["dit"]}


def request(tmp_path: Path, flops: float = 1e13, **settings) -> Request:
    return make_request("builtin:emoji", SMALL | {"storage": str(tmp_path)} | settings, flops=flops)


def test_the_search_costs_at_most_its_share(tmp_path: Path) -> None:
    """Summed run by run: 4 + 2 learning rates, 5 sizes of 2 seeds, 3 + 1 runs at each larger budget."""
    asked = request(tmp_path)
    plan = make_plan(asked)
    first, second, third = plan.budgets
    assert second / first == pytest.approx(4)
    assert third / second == pytest.approx(4)
    assert (4 + 2 + 5 * 2) * first + 4 * second + 4 * third == pytest.approx(0.1 * asked.flops)
    assert plan.most == pytest.approx(0.1 * asked.flops)


def test_a_warm_up_takes_at_most_a_tenth_of_a_run(tmp_path: Path) -> None:
    plan = make_plan(request(tmp_path, optim={"warmup_images": 500}))
    one = plan.cost("dit", 0).flops_per_image
    assert [plan.warmup("dit", 0, images * one) for images in (1000.5, 5000.5, 1e6)] == [100, 500, 500]


@pytest.mark.parametrize(
    ("losses", "expected"),
    [
        ({1e-3: 0.3, 2e-3: 0.2, 4e-3: 0.1}, 8e-3),
        ({1e-3: 0.1, 2e-3: 0.2, 6e-3: 0.3}, 5e-4),
        ({1e-3: 0.3, 2e-3: 0.1, 4e-3: 0.2}, None),
        ({1e-3: 0.2, 2e-3: 0.1, 4e-3: math.inf}, None),  # the next one diverged: the best has both neighbours
        ({1e-3: math.inf, 2e-3: math.inf}, None),
        ({1e-3: 0.2}, None),
    ],
)
def test_the_pilot_goes_on_beyond_the_best_learning_rate(losses: dict[float, float], expected: float | None) -> None:
    assert further_rate(losses) == expected


def test_a_budget_that_is_too_small_names_the_smallest_that_works(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--flops") as refused:
        make_plan(request(tmp_path, flops=1e9))
    least = float(refused.value.expected.removeprefix("at least "))
    make_plan(request(tmp_path, flops=1.01 * least))
    with pytest.raises(UserError, match="--flops"):
        make_plan(request(tmp_path, flops=0.98 * least))


@pytest.mark.parametrize(
    ("settings", "options", "named"),
    [
        ({}, {}, "--flops"),
        ({}, {"flops": 1e13, "hours": 2.0}, "--hours"),
        ({}, {"flops": 1e13, "devices": 2}, "--devices"),
        ({}, {"hours": 1.0, "devices": 4096}, "--devices"),
        ({}, {"hours": 1.0, "mfu": 1.5}, "--mfu"),
        ({"train": {"flops": 1e12}}, {"flops": 1e13}, "train.flops"),
        ({"optim": {"lr": 1e-3}}, {"flops": 1e13}, "optim.lr"),
        ({"model": {"name": "dit"}}, {"flops": 1e13}, "model.name"),
        ({"backbones": ["vgg"]}, {"flops": 1e13}, "backbones"),
        ({"shares": 0.2}, {"flops": 1e13}, "shares"),
    ],
)
def test_contradictions_are_told_before_anything_runs(settings: dict, options: dict, named: str) -> None:
    with pytest.raises(UserError) as refused:
        make_request("builtin:emoji", settings, **options)
    assert refused.value.setting == named


def test_a_dataset_smaller_than_the_batch_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="1692"):
        make_plan(request(tmp_path, flops=1e16, train={"global_batch": 4096}))


def test_a_device_or_weights_that_are_missing_are_told_before_anything_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DIFFSCALE_OFFLINE", "1")
    monkeypatch.setattr("diffscale.training.settings_check.gpus", list)
    with pytest.raises(UserError, match=r"train\.gpu"):
        make_plan(request(tmp_path, train={"global_batch": 8, "gpu": True}))
    with pytest.raises(UserError, match="dinov2_vitl14"):
        make_plan(request(tmp_path, eval={"metrics": ["fd_dinov2_vitl14"]}))


def test_hours_of_devices_are_a_compute() -> None:
    """2 hours of 3 devices of 1e12 FLOP/s at half their rate."""
    found = make_request("builtin:emoji", {}, hours=2, devices=3, mfu=0.5, device_flops=1e12)
    assert found.flops == pytest.approx(2 * 3600 * 3 * 0.5 * 1e12)


def test_schedules_and_resolutions_are_tried_in_every_combination_at_one_evaluation_resolution(tmp_path: Path) -> None:
    asked = request(tmp_path, schedules=["simple_cosine", "edm_lognormal"], resolutions=[16, 32])
    found = alternatives(asked)
    assert list(found) == [
        "simple_cosine, 16 px",
        "simple_cosine, 32 px",
        "edm_lognormal, 16 px",
        "edm_lognormal, 32 px",
    ]
    assert {keys["eval.eval_resolution"] for keys in found.values()} == {16}
    assert alternatives(request(tmp_path)) == {}
    plain, more = make_plan(request(tmp_path)), make_plan(asked)
    assert more.budgets[0] == pytest.approx(plain.budgets[0] * 96 / (96 + 4 * 16))  # four more runs at the largest


def test_sizes_follow_the_best_one_within_the_ladder() -> None:
    assert window(3) == (3, 4, 5)
    assert window(0) == (0, 1, 2)
    assert window(RUNGS - 1) == tuple(range(RUNGS - LATER_SIZES, RUNGS))


@pytest.mark.parametrize("backbone", FAMILIES)
@pytest.mark.parametrize("resolution", [32])
def test_a_rung_has_about_twice_the_parameters_of_the_one_below(backbone: str, resolution: int) -> None:
    import torch

    def parameters(rung: int) -> int:
        settings = FAMILIES[backbone](rung, resolution)
        with torch.device("meta"):
            model = create_model(**settings, resolution=resolution, num_classes=10)
        return sum(p.numel() for p in model.parameters())

    counts = [parameters(rung) for rung in range(RUNGS)]
    ratios = [b / a for a, b in pairwise(counts)]
    assert all(1.2 < ratio < 3.6 for ratio in ratios), ratios
    assert 1.5 < (counts[-1] / counts[0]) ** (1 / (RUNGS - 1)) < 2.2


@pytest.mark.parametrize("backbone", FAMILIES)
@pytest.mark.parametrize("resolution", [32, 64, 128])
def test_from_the_smallest_size_on_all_tokens_are_wider_than_their_patch(backbone: str, resolution: int) -> None:
    first = smallest(backbone, resolution)
    narrow = [narrow_tokens(FAMILIES[backbone](rung, resolution), 3) is not None for rung in range(RUNGS)]
    assert narrow == [first is None or rung < first for rung in range(RUNGS)]


@pytest.mark.parametrize("resolution", [32, 64, 128])
def test_the_numbers_of_a_patch_fit_into_its_token(resolution: int) -> None:
    """By the settings themselves: three colours of every pixel of a patch, or of a folded one."""
    widths = {"dit": "width", "jit": "bottleneck", "rin": "interface_width"}
    for backbone in (*widths, "hdit"):
        networks = [FAMILIES[backbone](rung, resolution) for rung in range(RUNGS)]
        tokens = [n["widths"][0] if backbone == "hdit" else n[widths[backbone]] for n in networks]
        wide = [token > 3 * n["patch_size"] ** 2 for token, n in zip(tokens, networks, strict=True)]
        assert wide == [narrow_tokens(n, 3) is None for n in networks]
    for network in (FAMILIES["uvit"](rung, resolution) for rung in range(RUNGS)):
        assert network["conv_widths"][0] > 3 * 4 ** network["patch_levels"]


def test_a_dit_for_large_patches_begins_with_wide_tokens(tmp_path: Path) -> None:
    """Patches of 16 x 16 pixels have 768 numbers, those of 32 x 32 more than any width of the ladder."""
    assert TRANSFORMERS[smallest("dit", 256) or 0][0] == 1024
    assert smallest("dit", 512) is None
    assert (smallest("unet", 512), smallest("uvit", 512)) == (0, 0)
    assert smallest("jit", 256) is None  # its bottleneck has 128 numbers: it is made to predict x0
    assert make_plan(request(tmp_path, 1e15, data={"resolution": 32})).rungs["dit"][0] == smallest("dit", 32) == 4
    clean = make_plan(request(tmp_path, 1e15, data={"resolution": 32}, diffusion={"prediction": "x0"}))
    assert clean.rungs["dit"][0] < 4

    source = write_folder(tmp_path / "images", {f"{i}.png": png(image) for i, image in enumerate(pictures(12, 512))})
    target = str(tmp_path / "data")
    build(BuildOptions(source=str(source), target=target, resolutions=(512,), split=0.25, workers=0))
    with pytest.raises(UserError, match="tokens are wider") as refused:
        make_plan(make_request(target, SMALL | {"storage": str(tmp_path), "data": {"resolution": 512}}, flops=1e18))
    assert (refused.value.setting, refused.value.value) == ("backbones", "dit")
