"""Pareto frontiers, curves read between evaluations, and what it cost to reach a value."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diffscale.report.stats.aggregate import aggregate
from diffscale.report.stats.facets import to_rows
from diffscale.report.stats.frontier import curves, fair, first_reach, is_on_frontier, pareto, read_at

from .records import make_record

pair = st.tuples(st.integers(1, 6), st.integers(1, 6))


@settings(max_examples=150, deadline=None)
@given(st.lists(pair, min_size=1, max_size=12), st.booleans())
def test_frontier_is_what_no_cheaper_or_equal_point_matches(points: list[tuple[int, int]], higher: bool) -> None:
    """Oracle: comparison of every pair."""
    compute, values = np.array(points, float).T
    mask = is_on_frontier(compute, values, higher)
    sign = -1 if higher else 1
    for i, (c, v) in enumerate(points):
        better = [(a <= c and sign * b <= sign * v and (a, b) != (c, v)) for a, b in points]
        twins = [j for j, p in enumerate(points) if p == (c, v) and mask[j]]
        assert (i in twins or bool(twins)) == (not any(better))
        assert len(twins) <= 1


@settings(max_examples=150, deadline=None)
@given(st.lists(pair, min_size=1, max_size=12), st.booleans())
def test_equally_cheap_points_are_compared_by_value_alone(points: list[tuple[int, int]], higher: bool) -> None:
    """Oracle: comparison of every pair, with computes within one step (here 1) as equal."""
    compute, values = np.array(points, float).T
    mask = is_on_frontier(compute, values, higher, np.ones(len(points)))
    sign = -1 if higher else 1
    for i, (c, v) in enumerate(points):
        if any(a <= c + 1 and sign * b < sign * v for a, b in points):
            assert not mask[i]
    assert mask[np.lexsort((compute, sign * values))[0]]


def test_a_rounding_of_steps_puts_no_point_on_the_frontier() -> None:
    """`cifar10-gpu`: the UNet's 153.9 at 1.249e14 FLOPs next to DiT's 113 at 1.253e14."""
    mask = is_on_frontier([1.249e14, 1.253e14, 6.3e13], [153.9, 113.0, 156.0], step=[6.4e10] * 3)
    assert mask.tolist() == [False, True, True]


def table(records: list):
    return aggregate(to_rows(records))


def test_pareto_has_overall_backbone_and_resolution_scopes() -> None:
    records = [
        make_record(model=m, resolution=r, images_seen=n, eval_resolution=64)
        for m in ("unet", "rin")
        for r in (32, 64)
        for n in (4096, 8192, 16384)
    ]
    front = pareto(table(records))
    assert set(front["scope"]) == {"overall", "backbone", "resolution"}
    assert set(front.loc[front["scope"] == "backbone", "scope_value"]) == {"unet", "rin"}
    assert set(front.loc[front["scope"] == "resolution", "scope_value"]) == {"32", "64"}
    for _, part in front.groupby(["facet", "scope", "scope_value"]):
        assert part["train_flops"].is_monotonic_increasing
        assert part["value"].is_monotonic_decreasing


def test_middle_of_a_decay_and_untrained_networks_are_in_no_frontier_or_curve() -> None:
    points = table([make_record(), make_record(endpoint="mid_decay", value=1.0), make_record(images_seen=0, value=0.5)])
    assert len(points) == 3
    assert len(fair(points)) == len(pareto(points).query("scope == 'overall'")) == 1
    assert [len(c.points) for c in curves(points)] == [1]


def test_curve_of_several_recipes_is_their_envelope() -> None:
    records = [
        make_record(images_seen=n, settings={"optim.lr": lr}, value=v)
        for lr, values in ((1e-4, (50, 40, 38)), (1e-3, (45, 42, 30)))
        for n, v in zip((4096, 8192, 16384), values, strict=True)
    ]
    (curve,) = curves(table(records))
    assert curve.recipes == 2
    assert curve.values.tolist() == pytest.approx([45, 40, 30])


def test_reads_a_point_or_between_two_and_never_beyond() -> None:
    points = table([make_record(images_seen=n, value=v) for n, v in ((1024, 100.0), (4096, 25.0))])
    flops = points["train_flops"].to_numpy()
    middle = read_at(points, math.sqrt(flops[0] * flops[1]))
    assert middle is not None
    assert middle.value == pytest.approx(50)
    assert middle.interpolated
    end = read_at(points, flops[1] * 1.01)
    assert end is not None
    assert not end.interpolated
    assert read_at(points, flops[1] * 2) is None
    assert read_at(points, flops[0] / 2) is None


def test_cost_of_reaching_a_value_is_interpolated_and_empty_where_it_was_not_reached() -> None:
    points = table([make_record(images_seen=n, value=v) for n, v in ((1024, 100.0), (4096, 25.0))])
    assert first_reach(points, [50.0], ["images_seen"])[0, 0] == pytest.approx(2048)
    assert first_reach(points, [120.0], ["images_seen"])[0, 0] == 1024
    assert math.isnan(first_reach(points, [24.0], ["images_seen"])[0, 0])
    assert math.isnan(first_reach(points, [50.0], ["energy_joules"])[0, 0])
