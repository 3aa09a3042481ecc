"""The laws that the study compares, on runs whose law is known."""

from __future__ import annotations

import pytest

from benchmarks.studies.loss_laws import errors, shared_floor
from diffscale.report.stats.predictions import points_of
from tests.report.test_recommendations import recommendation, searched

TRUTH = 0.1 + 0.1 * 16**-0.1


def test_a_floor_for_all_backbones_is_found() -> None:
    tables = {name: points_of(searched(name)) for name in ("dit", "unet")}
    assert shared_floor(tables, 6.4e13) == pytest.approx({"dit": TRUTH, "unet": TRUTH}, rel=0.02)


def test_every_law_is_compared_with_what_came_out() -> None:
    """A power law without a floor falls below the truth; the others are near it."""
    found = errors(recommendation(outcome=TRUTH))
    assert (found["backbone"], found["times_largest_budget"]) == ("dit", 4.0)
    for law in ("isoflop", "equal_weights", "shared_floor", "sizes_and_images"):
        assert abs(float(found[law])) < 5
    assert float(found["last_two_budgets"]) < 0
