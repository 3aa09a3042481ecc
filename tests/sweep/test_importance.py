"""Which settings mattered."""

from __future__ import annotations

import math

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


def test_few_trials_say_nothing_about_importance() -> None:
    """Four trials once said "data.resolution explains 100 % of the variance (95 % 100 %-100 %)"."""
    four = [{"side": side, "schedule": name} for side in (8, 16) for name in ("cosine", "linear")]
    table = importance(four, [600.0, 610.0, 850.0, 860.0])
    assert table[["importance", "low", "high"]].isna().all(axis=None)
    assert (table["trials"] == 4).all()


def test_a_value_with_a_single_trial_says_nothing_and_the_others_do() -> None:
    points = [{"a": i % 2, "b": i == 0} for i in range(12)]
    table = importance(points, [1.0 + (i % 2) + 0.01 * i for i in range(12)]).set_index("setting")
    assert math.isnan(table.importance["b"])
    assert table.importance["a"] > 0.9


def test_a_setting_that_follows_from_another_has_no_row() -> None:
    """Each network has its own warm-up here: what it explains is what the network explains."""
    points = [
        {"model": {"preset": model}, "optim.warmup_images": warmup, "optim.lr": lr}
        for model, warmup in (("unet", 100), ("dit", 300), ("uvit", 300))
        for lr in (1e-3, 2e-3, 4e-3)
    ]
    table = importance(points, [1.0, 1.1, 1.2, 2.0, 2.1, 2.2, 3.0, 3.1, 3.2])
    assert set(table.setting) == {"model", "optim.lr"}
