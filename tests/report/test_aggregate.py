"""Intervals hold the variance between training seeds, also where a point has one seed and its backbone has more."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from diffscale.report.stats.aggregate import aggregate
from diffscale.report.stats.facets import to_rows

from .records import make_record


def points(records: list):
    return aggregate(to_rows(records))


def test_interval_is_the_t_interval_of_the_logarithms() -> None:
    values = [10.0, 11.0, 12.5]
    point = points([make_record(seed=s, value=v, value_low=None, value_high=None) for s, v in enumerate(values)]).iloc[
        0
    ]
    low, high = stats.t.interval(0.95, 2, np.mean(np.log(values)), stats.sem(np.log(values)))  # oracle: scipy
    assert point["value"] == pytest.approx(math.exp(np.mean(np.log(values))))
    assert (point["value_low"], point["value_high"]) == pytest.approx((math.exp(low), math.exp(high)))
    assert (point["noise"], point["seeds"], point["df"]) == ("seeds", 3, 2)


def test_a_point_with_one_seed_takes_the_spread_of_the_replicated_ones() -> None:
    small = [make_record(seed=s, value=v, images_seen=4096) for s, v in enumerate((100.0, 110.0, 121.0))]
    table = points([*small, make_record(value=50.0, images_seen=8192, value_low=49.9, value_high=50.1)])
    spread = np.std(np.log([100, 110, 121]), ddof=1)
    half = stats.t.ppf(0.975, 2) * spread
    assert table.loc[1, "seeds"] == 1
    assert table.loc[1, "value_high"] == pytest.approx(50 * math.exp(half))


def test_a_backbone_that_was_never_repeated_borrows_from_all_and_says_so() -> None:
    repeated = [make_record(seed=s, value=100.0 + 5 * s) for s in range(3)]
    table = points([*repeated, make_record(model="rin", value=80.0)])
    assert dict(zip(table["model"], table["noise"], strict=True)) == {"unet": "seeds", "rin": "seeds of all backbones"}


def test_without_seeds_the_interval_is_the_evaluations_own_and_without_that_unknown() -> None:
    table = points([make_record(value=10.0, value_low=9.0, value_high=11.0)])
    assert table.loc[0, "noise"] == "evaluation"
    assert table.loc[0, "value_high"] == pytest.approx(10 * (11 / 9) ** 0.5, rel=1e-6)
    bare = points([make_record(value=10.0, value_low=None, value_high=None)])
    assert bare.loc[0, "noise"] == "unknown"
    assert math.isnan(bare.loc[0, "value_low"])


def test_interval_is_never_less_than_the_evaluations_noise() -> None:
    twins = [make_record(seed=s, value=10.0, value_low=8.0, value_high=12.5) for s in range(3)]
    point = points(twins).iloc[0]
    assert point["value_high"] > 10.5


def test_sample_seeds_are_no_training_seeds() -> None:
    again = [make_record(value=v, sample_seed=s, value_low=None, value_high=None) for s, v in enumerate((10.0, 12.0))]
    assert points(again).loc[0, "seeds"] == 1
    assert points(again).loc[0, "noise"] == "unknown"


def test_metrics_that_can_be_negative_are_averaged_as_they_are() -> None:
    point = points([make_record(seed=s, metric="kid", value=v) for s, v in enumerate((-0.001, 0.003))]).iloc[0]
    assert point["value"] == pytest.approx(0.001)


def test_coverage_of_the_interval_on_simulated_seeds() -> None:
    """95 % t-intervals with pooled variance, 3 seeds at 2 points and 1 at a third: nominal coverage within noise."""
    rng = np.random.default_rng(0)
    records, truth = [], 20.0
    for model in range(120):
        for images, seeds in ((4096, 3), (8192, 3), (16384, 1)):
            for seed in range(seeds):
                value = truth * math.exp(0.05 * rng.standard_normal())
                records.append(
                    make_record(
                        model=f"m{model}", seed=seed, images_seen=images, value=value, value_low=None, value_high=None
                    )
                )
    table = points(records)
    covered = ((table["value_low"] <= truth) & (truth <= table["value_high"])).mean()
    assert 0.92 <= covered <= 0.98
