"""The whole command with real Ray on tiny networks: killed in the middle, continued, trained and compared."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import pytest

from diffscale.config.load import load_experiment
from diffscale.records.recommendation import read_recommendations

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]
TINY = [
    "name=tiny",
    "share=0.7",
    "backbones=[dit]",
    "learning_rates=[1e-3,2e-3]",
    "seeds=1",
    "sizes=3",
    "factor=1.5",
    "data.resolution=16",
    "train.global_batch=8",
    "train.trackers=[]",
    "train.cpus_per_worker=1",
    "eval.n_generated=16",
    "eval.n_reference=32",
    "eval.n_heldout=16",
    "eval.solver.steps=2",
    "eval.grid_images=4",
    "eval.batch=16",
]


def start(tmp_path: Path) -> subprocess.Popen:
    command = [sys.executable, "-m", "diffscale.recommend", "builtin:emoji", "--flops", "1.5e11", "--go", *TINY]
    return subprocess.Popen([*command, f"storage={tmp_path}"], start_new_session=True)


def ended(tmp_path: Path) -> int:
    return len(list(tmp_path.glob("sweeps/*/ended/*.json")))


def test_a_killed_recommendation_continues_and_is_compared_with_what_came_true(tmp_path: Path) -> None:
    process = start(tmp_path)
    while ended(tmp_path) < 3:
        assert process.poll() is None, f"ended with {process.returncode} before it could be killed"
        time.sleep(0.2)
    before = {f: f.stat().st_mtime_ns for f in tmp_path.glob("sweeps/*/ended/*.json")}
    os.killpg(process.pid, signal.SIGKILL)
    assert start(tmp_path).wait(timeout=600) == 0
    assert all(f.stat().st_mtime_ns == when for f, when in before.items())  # what was done is not repeated
    (found,) = read_recommendations([str(tmp_path / "recommendations")])
    (part,) = found.searched
    assert [sum(p.budget == b for p in part.points) for b in range(3)] == [3, 3, 3]
    assert len(part.learning_rates) > 2  # of two the best is at an end, so a third was tried
    assert len(part.budget_rates) == 3
    assert all(later in (rate, rate / 2) for rate, later in pairwise(part.budget_rates))
    assert found.search_flops <= 1.05 * 0.7 * found.flops  # runs end at whole steps
    assert found.search_flops + found.recipe.flops == pytest.approx(found.flops)
    assert found.outcome is not None
    assert found.outcome.flops == pytest.approx(found.recipe.flops, rel=0.02)
    assert found.recipe.val_loss.low < found.recipe.val_loss.value < found.recipe.val_loss.high
    (preset,) = tmp_path.glob("recommendations/*/recipe.yaml")
    experiment = load_experiment(str(preset), [f"storage={tmp_path}"])
    assert experiment.model.name == "dit"
    assert {point.run_name for point in part.points} == {experiment.name}  # it continues a run of the search
    assert experiment.train.flops == pytest.approx(found.recipe.flops)
    assert start(tmp_path).wait(timeout=200) == 0
    (again,) = read_recommendations([str(tmp_path / "recommendations")])
    assert (again.search_flops, again.outcome) == (found.search_flops, found.outcome)  # a finished one says it again
    assert (again.recipe.rung, again.recipe.flops) == (found.recipe.rung, found.recipe.flops)
    assert again.recipe.val_loss.numbers == pytest.approx(found.recipe.val_loss.numbers, rel=1e-6)
