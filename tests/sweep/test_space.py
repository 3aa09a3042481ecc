"""The points of a sweep."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from diffscale.core.errors import UserError
from diffscale.sweep.settings import Sweep
from diffscale.sweep.space import edges, grid, nest, overrides_of, point_id, satisfies


def sweep(**changes) -> Sweep:
    return Sweep.model_validate({"name": "s", "base": "quickstart-unet", **changes})


def test_a_grid_is_every_combination_of_values_and_variants() -> None:
    s = sweep(space={"data.resolution": [16, 32]}, variants={"a": {"optim.lr": 1}, "b": {"optim.lr": 2}})
    points = grid(s)
    assert len(points) == 4 == len({point_id(p) for p in points})
    assert overrides_of(s, points[-1]) == {"optim.lr": 2, "data.resolution": 32}


def test_draws_are_the_same_every_time_and_inside_their_bounds() -> None:
    s = sweep(space={"optim.lr": {"loguniform": [1e-5, 1e-2]}}, search={"name": "random", "samples": 50, "seed": 3})
    rates = [p["optim.lr"] for p in grid(s)]
    assert rates == [p["optim.lr"] for p in grid(s)]
    assert 1e-5 <= min(rates) < 1e-4
    assert 1e-3 < max(rates) <= 1e-2


@pytest.mark.parametrize(
    ("values", "best", "side"),
    [
        ([16, 32, 64], 16, "smaller"),
        ([16, 32, 64], 32, None),
        ([64, 16, 32], 64, "larger"),
        ({"loguniform": [1e-5, 1e-2]}, 9e-3, "larger"),
        ({"loguniform": [1e-5, 1e-2]}, 1e-3, None),  # in the middle of the logarithm, near the lower end otherwise
        ({"uniform": [0.0, 0.5]}, 0.01, "smaller"),
        (["cosine", "linear"], "cosine", None),
        ([True, False], True, None),
        ([None, 0.1], 0.1, None),
        ([32], 32, None),
    ],
)
def test_a_best_value_at_the_edge_names_the_side_to_extend(values, best, side) -> None:
    s = sweep(space={"key": values}, search={"name": "random" if isinstance(values, dict) else "grid"})
    found = edges(s, {"key": best})
    assert len(found) == (side is not None)
    assert side is None or f"try {side} ones" in found[0]


@pytest.mark.parametrize(
    "bad",
    [
        {},
        {"space": {"a": {"uniform": [2, 1]}}},
        {"space": {"a": {"loguniform": [0, 1]}}},
        {"space": {"a": {"uniform": [0, 1]}}},  # drawn, but search is grid
        {"space": {"a": [1]}, "scheduler": {"name": "halving"}},
        {"space": {"a": [1]}, "scheduler": {"name": "asha", "rungs_flops": [2, 1]}},
        {"space": {"a": [1]}, "search": {"name": "tpe"}, "scheduler": {"name": "halving", "rungs_flops": [1]}},
    ],
)
def test_a_sweep_that_cannot_be_is_refused(bad: dict) -> None:
    with pytest.raises(ValidationError):
        sweep(**bad)


def test_constraints_compare_settings_and_run_nothing_else() -> None:
    settings = {"data.resolution": 64, "model.name": "rin"}
    assert satisfies("data.resolution <= 64 and model.name == 'rin'", settings)
    assert not satisfies("data.resolution * 2 < 100", settings)
    for bad in ("__import__('os').system('true')", "model.nothing > 1", "(", "data.__class__", "9**9**9**9"):
        with pytest.raises(UserError, match="constraints"):
            satisfies(bad, settings)


def test_dotted_keys_become_a_tree() -> None:
    assert nest({"a.b": 1, "a.c": {"d": 2}, "e": 3}) == {"a": {"b": 1, "c": {"d": 2}}, "e": 3}
    with pytest.raises(UserError, match=r"a\.b"):
        nest({"a": 1, "a.b": 2})


def test_a_point_adds_to_a_section_without_changing_the_sweep() -> None:
    s = sweep(overrides={"model": {"name": "unet"}}, variants={"a": {"model.skips": False}, "b": {}})
    assert nest(overrides_of(s, grid(s)[0])) == {"model": {"name": "unet", "skips": False}}
    assert nest(overrides_of(s, grid(s)[1])) == {"model": {"name": "unet"}}
