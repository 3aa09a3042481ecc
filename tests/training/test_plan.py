from __future__ import annotations

import math
from pathlib import Path

import pytest

from diffscale.config.experiment import OptimSettings
from diffscale.training.parallel import World, passes
from diffscale.training.plan import learning_rate, make_plan, whole_batches

from .small import BATCH, experiment


def rate(images: int, end: int | None = None, **optim: object) -> float:
    return learning_rate(OptimSettings(lr=1.0, **optim), images, 2, end)  # type: ignore[arg-type]


def test_warm_up_rises_in_a_line_and_no_step_has_rate_zero() -> None:
    assert rate(0, warmup_images=10) == pytest.approx(0.1)
    assert rate(4, warmup_images=10) == pytest.approx(0.5)
    assert rate(20, warmup_images=10) == 1


def test_inverse_sqrt_is_edm2s() -> None:
    """Karras et al. 2023, eq. 67: lr / sqrt(max(t / t_ref, 1))."""
    settings = {"schedule": "inverse_sqrt", "reference_images": 101}
    assert rate(50, **settings) == 1
    assert rate(403, **settings) == pytest.approx(0.5)


def test_cosine_runs_through_the_share_of_the_half_wave() -> None:
    """RIN: lr/2 (1 + cos(pi rate progress)); with rate 0.8 the end is at 0.0955 of the top."""
    assert rate(999, end=1000, schedule="cosine", cosine_rate=0.8) == pytest.approx(0.0955, abs=1e-4)
    assert rate(499, end=1000, schedule="cosine") == pytest.approx(0.5)


def test_a_decay_branch_falls_in_a_line_to_zero() -> None:
    assert rate(100, end=1000, decay_images=200) == 1
    assert rate(899, end=1000, decay_images=200) == pytest.approx(0.5)
    assert rate(998, end=1000, decay_images=200) == pytest.approx(0.005)


def test_budgets_and_points_are_whole_batches(tmp_path: Path) -> None:
    e = experiment(tmp_path, train={"images": 1000}, eval={"n_generated": 8, "points": [0.5, 1.0]})
    plan = make_plan(e, flops_per_image=10.0)
    assert plan.end == math.ceil(1000 / BATCH) * BATCH
    assert plan.points == (whole_batches(500, BATCH), plan.end)
    assert make_plan(experiment(tmp_path, train={"images": None, "flops": 1e4}), 10.0).end == plan.end


def test_a_budget_of_seconds_is_evaluated_where_its_shares_are_crossed(tmp_path: Path) -> None:
    train = {"images": None, "device_seconds": 100.0}
    plan = make_plan(experiment(tmp_path, train=train, eval={"n_generated": 8, "points": [0.5, 1.0]}), 10.0)
    assert plan.evaluates(BATCH, before=49.9, after=50.1, ended=False)
    assert not plan.evaluates(BATCH, before=50.1, after=60.0, ended=False)
    assert plan.evaluates(BATCH, before=99.0, after=100.5, ended=plan.finished(BATCH, 100.5))


@pytest.mark.parametrize("size", [1, 2, 3, 5, 7, 16])
def test_shares_cover_the_batch_once_and_differ_by_one(size: int) -> None:
    shares = [World(rank, size).share(16) for rank in range(size)]
    assert [i for first, last in shares for i in range(first, last)] == list(range(16))
    assert max(b - a for a, b in shares) - min(b - a for a, b in shares) <= 1
    assert passes(16, size, None) == 1


def test_the_largest_share_sets_the_number_of_passes() -> None:
    assert passes(16, 3, 2) == 3
    assert passes(16, 1, 5) == 4
