"""The recipe of a search whose laws are known: the better backbone, a size near the best, and the preset's settings."""

from __future__ import annotations

from pathlib import Path

import pytest

from diffscale.config.factory import open_training_data
from diffscale.config.load import load_experiment
from diffscale.recommendation.command_line import make_request
from diffscale.recommendation.plan import make_plan, run_settings, runs_name
from diffscale.recommendation.recipe import choose_recipe, rate_beyond
from diffscale.recommendation.run import preset_of, recipe_settings
from diffscale.records.recommendation import Outcome, Recommendation, SamplingChoice
from tests.report.test_recommendations import searched


def test_the_recipe_is_the_better_backbone_near_its_best_size(tmp_path: Path) -> None:
    """The laws of `searched`: the best size is 1e6 parameters at 4e12 FLOPs and grows with the square root."""
    settings = {"data": {"resolution": 16}, "train": {"global_batch": 16}, "backbones": ["dit", "unet"], "share": 0.36}
    request = make_request("builtin:emoji", settings | {"storage": str(tmp_path)}, flops=1e14, price=2.0)
    plan, parts = make_plan(request), [searched(), searched("unet", worse=1.2)]
    dataset = open_training_data(run_settings(request, "dit", 0))
    recipe = choose_recipe(parts, plan, 6.4e13, dataset, price=2.0)
    assert recipe.backbone == "dit"
    assert recipe.parameters == pytest.approx(4e6, rel=0.5)  # the ladder's nearest to 4e6
    assert recipe.images == pytest.approx(6.4e13 / plan.cost("dit", recipe.rung).flops_per_image, rel=1e-3)
    assert recipe.val_loss.value == pytest.approx(0.1 + 0.1 * 16**-0.1, rel=0.03)
    assert recipe.device_seconds == pytest.approx(6.4e13 / 1e10)  # the speed of its runs
    assert recipe.cost == pytest.approx(2.0 * recipe.device_seconds / 3600)
    assert any("unet" in line and "worse" in line for line in recipe.why)
    found = Recommendation(
        name="recommend",
        dataset="emoji",
        dataset_hash="0",
        resolution=16,
        metric="fid",
        flops=1e14,
        share=0.36,
        search_flops=3.6e13,
        budgets=plan.budgets,
        searched=tuple(parts),
        recipe=recipe,
    )
    experiment = recipe_settings(request, found)
    assert (experiment.model.name, experiment.name) == ("dit", runs_name(request))
    assert (experiment.optim.lr, experiment.train.flops) == (1e-3, 6.4e13)
    assert "# Sampling with dpmpp_2m and guidance 1, as in the settings: " in preset_of(request, found)
    choice = SamplingChoice(
        solver="heun,steps=9", guidance="1.5,interval=-3:5", heldout={}, distance=9.0, nfe=35, sampling_flops=4e9
    )
    outcome = Outcome(
        run_id="",
        images=0,
        flops=0,
        device_seconds=0,
        val_loss=0.1,
        distance=9,
        distance_low=None,
        distance_high=None,
        guidance=choice,
    )
    text = preset_of(request, found.model_copy(update={"outcome": outcome}))
    assert "# Sampling with heun and guidance 1.5" in text
    assert "35 network evaluations, 4e+09 FLOPs an image" in text
    (tmp_path / "recipe.yaml").write_text(text)
    chosen = load_experiment(str(tmp_path / "recipe.yaml"), [f"storage={tmp_path}"])
    assert chosen.eval.solver.model_dump() == {"name": "heun", "steps": 9} | chosen.eval.solver.model_dump()
    assert (chosen.eval.guidance_scale, chosen.eval.guidance_interval) == (1.5, (-3, 5))
    assert chosen.run_id("data") == experiment.run_id("data")


@pytest.mark.parametrize(
    ("rates", "flops", "expected"),
    [
        ([8e-3, 4e-3, 2e-3], 6.4e13, 1e-3),  # half at each factor of 4, so at the next one too
        ([8e-3, 4e-3, 2e-3], 1.6e13 * 2, 2e-3 / 2**0.5),
        ([8e-3, 4e-3, 4e-3], 6.4e13, 4e-3),
        ([8e-3], 6.4e13, 8e-3),
    ],
)
def test_the_learning_rate_goes_on_as_it_fell(rates: list[float], flops: float, expected: float) -> None:
    assert rate_beyond(rates, [1e12, 4e12, 1.6e13], flops) == pytest.approx(expected, rel=1e-2)
