"""A real sweep on a real Ray cluster: cut off by SIGKILL at any moment, it ends as if it had not been."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
import yaml

from diffscale.cli import load_experiment
from diffscale.errors import UserError
from diffscale.sweep.ledger import Ledger, check_comparable
from diffscale.tune import load_sweep, planned

TINY = {
    "data.resolution": 16, "train.global_batch": 8, "train.workers": 1, "train.precision": "fp32",
    "train.compile": False, "train.trackers": [], "eval.n_generated": 16, "eval.n_reference": 32, "eval.batch": 16,
    "eval.solver.steps": 2, "eval.grid_images": 4,
    "model": {"name": "unet", "model_channels": 32, "channel_mult": [1], "num_blocks": 1, "attn_resolutions": []},
}  # fmt: skip


def write_sweep(tmp_path: Path, **changes) -> Path:
    tree = {
        "name": "tiny", "base": "quickstart-unet", "overrides": TINY | {"storage": str(tmp_path / "storage")},
        "space": {"optim.lr": [1e-4, 1e-3, 3e-1], "diffusion.prediction": ["v"]},
        "scheduler": {"name": "halving", "rungs_flops": [2.0e9, 4.0e9], "reduction": 3},
    } | changes  # fmt: skip
    file = tmp_path / "sweep.yaml"
    file.write_text(yaml.safe_dump(tree))
    return file


def ends(folder: Path) -> dict[str, str]:
    table = pd.read_csv(next(folder.glob("storage/sweeps/tiny-*")) / "trials.csv")
    return dict(zip(table["optim.lr"].astype(str), table["end"], strict=True))


def tune(sweep: Path, *overrides: str) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-m", "diffscale.tune", str(sweep), *overrides], start_new_session=True)


def test_a_sweep_over_resolution_needs_a_common_one(tmp_path: Path) -> None:
    ledger = Ledger(load_sweep(str(write_sweep(tmp_path)), ["space.data.resolution=[8,16]"]))
    with pytest.raises(UserError, match="eval_resolution=16"):
        planned(ledger)
    ledger = Ledger(load_sweep(str(write_sweep(tmp_path)), ["space.data.resolution=[8,16]", "eval.eval_resolution=16"]))
    check_comparable(ledger.sweep, planned(ledger))


def test_overrides_reach_the_sweep_or_every_trial(tmp_path: Path) -> None:
    sweep = load_sweep(str(write_sweep(tmp_path)), ["max_concurrent=1", "optim.weight_decay=0.5", "search.seed=4"])
    assert (sweep.max_concurrent, sweep.search.seed) == (1, 4)
    assert all(t.experiments[0].optim.weight_decay == 0.5 for t in planned(Ledger(sweep)))


def test_halving_ends_with_a_preset_that_train_takes(tmp_path: Path) -> None:
    assert tune(write_sweep(tmp_path)).wait(timeout=280) == 0
    assert sorted(ends(tmp_path).values()) == ["finished", "stopped", "stopped"]
    folder = next(tmp_path.glob("storage/sweeps/tiny-*"))
    best = load_experiment(str(folder / "best.yaml"))
    assert ends(tmp_path)[str(best.optim.lr)] == "finished"
    assert (folder / "importance.csv").exists()


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_killed_sweep_stops_the_same_trials(tmp_path: Path) -> None:
    calm, rough = tmp_path / "calm", tmp_path / "rough"
    calm.mkdir()
    rough.mkdir()
    assert tune(write_sweep(calm)).wait(timeout=280) == 0
    sweep, begun, code = write_sweep(rough), time.monotonic(), None
    for patience in (15, 30, 45, 280):
        process = tune(sweep)
        try:
            code = process.wait(timeout=patience)
            break
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
    assert code == 0, f"after {time.monotonic() - begun:.0f} s"
    assert ends(rough) == ends(calm)
