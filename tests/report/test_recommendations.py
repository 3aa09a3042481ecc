"""What a report says of a recommendation: the advice first, how its predictions fared, figures and a comparison."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from diffscale.records.recommendation import (
    Outcome,
    Point,
    Prediction,
    Recipe,
    Recommendation,
    Searched,
    read_recommendations,
    write_recommendation,
)
from diffscale.records.store import RECORDS_FILE, write_records_file
from diffscale.report.analysis import analyse
from diffscale.report.stats.predictions import backtest, distance_law, loss_law
from diffscale.report.stats.recommendations import compare_recommendations, exponents, fared
from diffscale.report.write import write_report

from .records import make_record

BUDGETS = (1e12, 4e12, 1.6e13)
LARGER = 6.4e13
NOISE = 0.004


def searched(backbone: str = "dit", worse: float = 1.0, budgets: tuple[float, ...] = BUDGETS) -> Searched:
    """Runs whose best size grows with the square root of compute, and whose loss falls to a floor of 0.1."""
    rng, points = np.random.default_rng(1), []
    for budget, flops in enumerate(budgets):
        best = 1e6 * (flops / 4e12) ** 0.5
        for step in (-1, 0, 1):
            for seed in range(2 if budget == 0 else 1):
                loss = worse * (0.1 + 0.1 * (flops / 4e12) ** -0.1) * np.exp(0.04 * step**2 + NOISE * rng.normal())
                parameters = round(best * np.exp(step))
                points.append(
                    Point(
                        run_id=f"{backbone}-{budget}-{step}-{seed}",
                        run_name="recommend",
                        rung=budget + step + 1,
                        seed=seed,
                        budget=budget,
                        parameters=parameters,
                        images=round(flops / (12 * parameters)),
                        flops=flops,
                        flops_per_image=12.0 * parameters,
                        device_seconds=flops / 1e10,
                        val_loss=loss,
                        distance=2000 * loss,
                    )
                )
    return Searched(backbone=backbone, learning_rates={"0.001": 0.2}, learning_rate=1e-3, points=tuple(points))


def recommendation(outcome: float | None = 0.185) -> Recommendation:
    recipe = Recipe(
        backbone="dit",
        rung=5,
        parameters=4_000_000,
        flops=6.4e13,
        images=1_300_000,
        epochs=13.0,
        parameters_best=Prediction(value=4e6, low=2e6, high=8e6),
        images_best=Prediction(value=1.3e6, low=6e5, high=2e6),
        val_loss=Prediction(value=0.18, low=0.17, high=0.19),
        distance=Prediction(value=360, low=300, high=420),
        device_seconds=7200.0,
        cost=6.0,
        others={"unet": Prediction(value=0.2, low=0.195, high=0.21)},
        why=("dit has the lowest predicted validation loss.", "unet at its own best size: 0.2, worse."),
        caveats=("The prediction goes 4 times beyond the largest budget of the search.",),
    )
    return Recommendation(
        name="recommend",
        dataset="pets",
        dataset_hash="0" * 16,
        resolution=32,
        metric="fid",
        flops=1e14,
        share=0.36,
        search_flops=3.6e13,
        budgets=BUDGETS,
        searched=(searched(), searched("unet", worse=1.2)),
        recipe=recipe,
        outcome=None
        if outcome is None
        else Outcome(
            run_id="end",
            images=1_300_000,
            flops=6.4e13,
            device_seconds=7300.0,
            val_loss=outcome,
            distance=370.0,
            distance_low=None,
            distance_high=None,
        ),
    )


def test_the_first_paragraph_says_what_to_train_and_the_second_how_far_to_trust_it() -> None:
    first, second, *_ = (f["text"] for f in analyse([make_record()], [recommendation()]).findings)
    assert first.startswith("For pets at 32 px and 1e14 FLOPs train dit of 4,000,000 parameters on 1,300,000 images")
    assert "0.18 [0.17, 0.19]" in first
    assert "It came out as 0.185" in first
    assert "the search used 36 % of the compute".replace(" %", "%") in second
    assert "inside the interval" in second
    assert "unet at its own best size: 0.2, worse." in second


def test_predictions_are_held_against_what_came_true() -> None:
    table = fared([recommendation(), recommendation(None)]).set_index("quantity")
    loss = table.loc["validation loss"]
    assert loss["error_percent"].iloc[0] == pytest.approx(100 * (0.18 / 0.185 - 1))
    assert loss["inside"].iloc[0]
    assert loss["measured"].isna().tolist() == [False, True]


def test_laws_of_a_search_recover_what_made_its_runs() -> None:
    """Best size: the square root of compute; loss 0.1 + 0.1 · 16^-0.1 at 16 times the middle budget."""
    part = searched()
    law = loss_law(part)
    assert law is not None
    assert law.exponents()["parameters"][0] == pytest.approx(0.5, abs=0.05)
    value, low, high = law.loss([6.4e13], of="run")[:, 0]
    truth = 0.1 + 0.1 * 16**-0.1
    assert low < truth < high
    assert value == pytest.approx(truth, rel=0.03)
    distances = distance_law(part)
    assert distances is not None
    assert distances.predict(6.4e13)[0] == pytest.approx(2000 * truth, rel=0.06)
    assert "0.57" in exponents(part, law)


def test_a_law_is_tested_on_the_largest_budget_where_three_others_are_left() -> None:
    assert backtest(searched()) is None
    tested = backtest(searched(budgets=(*BUDGETS, LARGER)))
    assert tested is not None
    error, inside = tested
    assert abs(error) < 3
    assert inside


def test_a_report_of_its_folder_has_the_figures_and_the_table(tmp_path: Path) -> None:
    write_recommendation(str(tmp_path / "in"), recommendation())
    write_records_file(str(tmp_path / "in" / RECORDS_FILE), [make_record()])
    analysis = write_report([str(tmp_path / "in")], tmp_path / "out")
    assert len(analysis.recommendations) == 1
    assert len(pd.read_csv(tmp_path / "out" / "recommendation.csv")) == 2
    plots = {path.stem for path in (tmp_path / "out" / "plots").glob("recommendation-*.png")}
    assert {"recommendation-loss_vs_compute", "recommendation-distance_vs_compute"} <= plots
    assert {"recommendation-isoflop-dit", "recommendation-isoflop-unet"} <= plots
    page = (tmp_path / "out" / "index.html").read_text()
    data = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    assert data is not None
    laws = json.loads(data[1])["isoflop"]
    assert [law["model"] for law in laws] == ["dit", "unet"]
    for budget in [budget for law in laws for budget in law["budgets"]]:
        assert min(budget["curve"]) == pytest.approx(budget["best"][1], rel=1e-3)
    assert read_recommendations([str(tmp_path / "in")]) == [recommendation()]


def test_a_comparison_marks_a_promise_that_a_new_version_breaks() -> None:
    same, broken = (compare_recommendations([recommendation()], [recommendation(loss)]) for loss in (0.188, 0.2))
    assert same["verdict"].tolist() == ["same within noise"]
    assert broken["verdict"].tolist() == ["regression"]
