"""The points of a sweep and which of them go on."""

from __future__ import annotations

import numpy as np
import pytest
from pydantic import ValidationError

from diffscale.core.errors import UserError
from diffscale.sweep.decisions import Decisions, promoted
from diffscale.sweep.importance import importance
from diffscale.sweep.settings import Sweep
from diffscale.sweep.space import grid, nest, overrides_of, point_id, satisfies


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


def test_one_in_so_many_goes_on_and_what_is_not_finite_never_does() -> None:
    values = {"a": 3.0, "b": 1.0, "c": 2.0, "d": float("nan")}
    assert promoted(values, 2) == {"b", "c"}
    assert promoted(values, 2, higher_is_better=True) == {"a", "c"}
    assert promoted({"a": 1.0, "b": 1.0}, 2) == {"a"}
    assert promoted({"a": float("inf")}, 2) == set()
    assert promoted({}, 2) == set()


def test_a_decision_is_never_revoked(tmp_path) -> None:
    decisions = Decisions(str(tmp_path))
    assert decisions.get(0, "t") is None
    assert decisions.put(0, "t", goes_on=False, value=1.0) is False
    assert Decisions(str(tmp_path)).put(0, "t", goes_on=True, value=1.0) is False


def test_importance_finds_the_setting_that_matters_and_not_the_other() -> None:
    rng = np.random.default_rng(0)
    points = [{"a": a, "b": b, "lr": float(rng.uniform())} for a in range(3) for b in range(3) for _ in range(4)]
    values = [float(np.exp(p["a"] + 0.1 * rng.normal())) for p in points]
    table = importance(points, values).set_index("setting")
    assert table.importance["a"] > 0.9
    assert table.low["a"] > 0.8
    assert table.importance["b"] < 0.1
    assert table.importance["lr"] < 0.2
