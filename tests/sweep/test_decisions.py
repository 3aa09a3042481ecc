"""Which trials continue from a rung."""

from __future__ import annotations

from diffscale.sweep.decisions import Decisions, survivors


def test_the_best_share_survives_and_a_value_that_is_not_finite_never_does() -> None:
    values = {"a": 3.0, "b": 1.0, "c": 2.0, "d": float("nan")}
    assert survivors(values, 2) == {"b", "c"}
    assert survivors(values, 2, higher_is_better=True) == {"a", "c"}
    assert survivors({"a": 1.0, "b": 1.0}, 2) == {"a"}
    assert survivors({"a": float("inf")}, 2) == set()
    assert survivors({}, 2) == set()


def test_a_decision_is_never_revoked(tmp_path) -> None:
    decisions = Decisions(str(tmp_path))
    assert decisions.get(0, "t") is None
    assert decisions.put(0, "t", goes_on=False, value=1.0) is False
    assert Decisions(str(tmp_path)).put(0, "t", goes_on=True, value=1.0) is False
