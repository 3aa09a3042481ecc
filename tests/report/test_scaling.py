"""Crossings, predictions at ten times the compute, and how wrong the prediction of each last point was."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from diffscale.report.stats.aggregate import aggregate
from diffscale.report.stats.facets import to_rows
from diffscale.report.stats.frontier import curves
from diffscale.report.stats.scaling import scaling
from diffscale.report.write import analyse

from .records import FLOPS_PER_IMAGE, make_record

IMAGES = [16384 * 2**i for i in range(7)]


def records_of(model: str, floor: float, scale: float, exponent: float, noise: float = 0.0, seeds: int = 1) -> list:
    rng = np.random.default_rng(3)
    return [
        make_record(
            model=model,
            seed=seed,
            images_seen=n,
            value_low=None,
            value_high=None,
            value=(floor + scale * (n * FLOPS_PER_IMAGE[model] / 1e14) ** -exponent)
            * math.exp(noise * rng.standard_normal()),
        )
        for n in IMAGES
        for seed in range(seeds)
    ]


def table_of(records: list):
    return scaling(curves(aggregate(to_rows(records))))[0]


def test_crossing_is_where_the_laws_cross() -> None:
    """Without floors the crossing has a closed form: (scale_a / scale_b)^(1 / (b_a - b_b))."""
    table = table_of(records_of("unet", 0.001, 20, 0.3) + records_of("rin", 0.001, 25, 0.6))
    (crossing,) = table[table["kind"] == "crossing"].to_dict("records")
    assert (crossing["model"], crossing["overtakes"]) == ("rin", "unet")
    assert crossing["crossing_flops"] == pytest.approx(1e14 * (25 / 20) ** (1 / 0.3), rel=0.02)
    assert crossing["crossing_low"] <= crossing["crossing_flops"] <= crossing["crossing_high"]
    assert crossing["crossing_probability"] > 0.95


def test_curves_that_never_cross_have_no_crossing() -> None:
    table = table_of(records_of("unet", 1, 20, 0.4) + records_of("rin", 2, 40, 0.4))
    assert set(table["kind"]) == {"fit"}


def test_crossing_beyond_the_data_is_called_an_extrapolation() -> None:
    table = table_of(records_of("unet", 0.001, 20, 0.3) + records_of("rin", 0.001, 40, 0.6))
    (crossing,) = table[table["kind"] == "crossing"].to_dict("records")
    assert "extrapolation" in crossing["note"]


def test_prediction_and_held_out_point() -> None:
    row = table_of(records_of("unet", 9, 30, 0.5, noise=0.01)).iloc[0]
    flops = IMAGES[-1] * FLOPS_PER_IMAGE["unet"]
    assert row["predicted_flops"] == pytest.approx(10 * flops)
    assert row["predicted_low"] <= 9 + 30 * (10 * flops / 1e14) ** -0.5 <= row["predicted_high"]
    assert abs(row["heldout_error_percent"]) < 5
    assert row["heldout_flops"] == pytest.approx(flops)
    assert row["heldout_inside"]


def test_short_curves_say_why_there_is_no_fit() -> None:
    row = table_of([make_record(images_seen=n) for n in IMAGES[:2]]).iloc[0]
    assert math.isnan(row["exponent"])
    assert "needs 3" in row["note"]


def test_fits_never_mix_groups_endpoints_or_resolutions() -> None:
    kinds = itertools.product(IMAGES[:4], ("constant", "decayed"), (2048, 5000), (32, 64))
    records = [
        make_record(images_seen=n, endpoint=end, n_generated=g, resolution=side, eval_resolution=64)
        for n, end, g, side in kinds
    ]
    fits = analyse(records).scaling.query("kind == 'fit'")
    assert len(fits) == 8
    assert (fits["points"] == 4).all()


def test_precision_and_kid_are_tabulated_but_not_fitted() -> None:
    analysis = analyse(
        [
            make_record(images_seen=n, metric=m, value=0.1 + i / 10)
            for i, n in enumerate(IMAGES)
            for m in ("precision", "kid")
        ]
    )
    assert analysis.scaling.empty
    assert len(analysis.points) == 2 * len(IMAGES)
    best = analysis.pareto.query("scope == 'overall'").groupby("metric")["value"]
    assert best.max()["precision"] == pytest.approx(0.7)
    assert best.min()["kid"] == pytest.approx(0.1)
