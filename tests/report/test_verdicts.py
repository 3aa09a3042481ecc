"""'A beats B' is said only where intervals that hold the variance between seeds are apart."""

from __future__ import annotations

import math

import numpy as np

from diffscale.report.stats.aggregate import aggregate
from diffscale.report.stats.facets import to_rows
from diffscale.report.stats.frontier import curves
from diffscale.report.stats.verdicts import verdicts
from diffscale.report.write import analyse

from .records import make_record


def runs(model: str, values: list[float], images: int = 65536, **more: object) -> list:
    return [make_record(model=model, seed=s, images_seen=images, value=v, **more) for s, v in enumerate(values)]


def verdict(records: list) -> str:
    return str(verdicts(curves(aggregate(to_rows(records))))["verdict"].iloc[0])


def said(records: list) -> str:
    return " ".join(finding["text"] for finding in analyse(records).findings)


def test_far_apart_with_seeds_is_a_claim() -> None:
    records = runs("unet", [20, 20.5, 21], 56000) + runs("rin", [40, 41, 40], 79058)
    assert verdict(records) == "beats"
    assert "unet beats rin" in said(records)


def test_overlapping_intervals_are_no_claim() -> None:
    records = runs("unet", [20, 22, 24], 56000) + runs("rin", [23, 21, 25], 79058)
    assert verdict(records) == "not separated"
    assert "beats" not in said(records)
    assert "Not separated" in said(records)


def test_single_seeds_are_no_claim_however_far_apart() -> None:
    records = runs("unet", [20], 56000) + runs("rin", [90], 79058)
    assert verdict(records) == "one seed each"
    assert "beats" not in said(records)


def test_different_compute_is_no_comparison() -> None:
    records = runs("unet", [20, 20.1, 20.2], 4096) + runs("rin", [90, 91, 92], 524288)
    assert verdict(records) == "no common compute"


def test_different_groups_are_no_comparison() -> None:
    records = runs("unet", [20, 20.1], 56000) + runs("rin", [90, 91], 79058, n_generated=5000)
    assert analyse(records).verdicts.empty


def test_higher_precision_beats() -> None:
    records = runs("unet", [0.8, 0.81, 0.8], 56000, metric="precision") + runs(
        "rin", [0.4, 0.41, 0.4], 79058, metric="precision"
    )
    table = analyse(records).verdicts
    assert (table["model"].iloc[0], table["verdict"].iloc[0]) == ("unet", "beats")


def test_equal_backbones_are_almost_never_separated() -> None:
    """66 pairs with the same truth and 5 % noise between seeds: non-touching 95 % intervals are rarer than 1 in 20."""
    rng = np.random.default_rng(1)
    records = [
        r for i in range(12) for r in runs(f"m{i:02d}", [30 * math.exp(0.05 * rng.standard_normal()) for _ in "abc"])
    ]
    table = verdicts(curves(aggregate(to_rows(records))))
    assert len(table) == 66
    assert (table["verdict"] == "beats").sum() <= 3


def test_best_schedule_is_claimed_only_where_it_separates() -> None:
    records = [
        r
        for name, values in (("cosine", [20, 20.2]), ("sigmoid", [20.1, 20.3]), ("linear", [30, 31]))
        for r in runs("unet", values, schedule=name)
    ]
    text = said(records)
    assert "cosine 20.1" in text
    assert "beats linear; not separated from sigmoid" in text
