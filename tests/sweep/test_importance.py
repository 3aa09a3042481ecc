"""Which settings mattered."""

from __future__ import annotations

import numpy as np

from diffscale.sweep.importance import importance


def test_importance_finds_the_setting_that_matters_and_not_the_other() -> None:
    rng = np.random.default_rng(0)
    points = [{"a": a, "b": b, "lr": float(rng.uniform())} for a in range(3) for b in range(3) for _ in range(4)]
    values = [float(np.exp(p["a"] + 0.1 * rng.normal())) for p in points]
    table = importance(points, values).set_index("setting")
    assert table.importance["a"] > 0.9
    assert table.low["a"] > 0.8
    assert table.importance["b"] < 0.1
    assert table.importance["lr"] < 0.2
