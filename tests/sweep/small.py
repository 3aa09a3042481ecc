"""A sweep of three tiny runs, as a file and as a process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import yaml

TINY = {
    "data.resolution": 16,
    "train.global_batch": 8,
    "train.workers": 1,
    "train.precision": "fp32",
    "train.compile": False,
    "train.trackers": [],
    "eval.n_generated": 16,
    "eval.n_reference": 32,
    "eval.batch": 16,
    "eval.solver.steps": 2,
    "eval.grid_images": 4,
    "model": {"name": "unet", "model_channels": 32, "channel_mult": [1], "num_blocks": 1, "attn_resolutions": []},
}


def write_sweep(tmp_path: Path, **changes) -> Path:
    """The file of a sweep whose runs go under `tmp_path`."""
    tree = {
        "name": "tiny",
        "base": "quickstart-unet",
        "overrides": TINY | {"storage": str(tmp_path / "storage")},
        "space": {"optim.lr": [1e-4, 1e-3, 3e-1], "diffusion.prediction": ["v"]},
        "scheduler": {"name": "halving", "rungs_flops": [2.0e9, 4.0e9], "reduction": 3},
    } | changes
    file = tmp_path / "sweep.yaml"
    file.write_text(yaml.safe_dump(tree))
    return file


def ends(folder: Path) -> dict[str, str]:
    """How the trial of each learning rate ended."""
    table = pd.read_csv(next(folder.glob("storage/sweeps/tiny-*")) / "trials.csv")
    return dict(zip(table["optim.lr"].astype(str), table["end"], strict=True))


def tune(sweep: Path, *overrides: str, environment: dict[str, str] | None = None) -> subprocess.Popen:
    """Start the command in a separate session, so that it can be killed with all that it started."""
    command = [sys.executable, "-m", "diffscale.tune", str(sweep), *overrides]
    return subprocess.Popen(command, start_new_session=True, env={**os.environ, **(environment or {})})
