"""The small real run that these tests train: 8-pixel emoji, a UNet of 50 thousand weights, computed as by default."""

from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path
from typing import Any

import psutil
import yaml

from diffscale.config.experiment import Experiment
from diffscale.config.factory import open_training_data
from diffscale.config.load import merge, validate
from diffscale.training.checkpoint import layout as ck
from diffscale.training.numerics import settled

BATCH = 12
SETTINGS: dict[str, Any] = {
    "name": "small",
    "data": {"resolution": 8},
    "model": {"name": "unet", "model_channels": 16, "channel_mult": [1, 2], "num_blocks": 1, "attn_resolutions": [4]},
    "optim": {"lr": 2e-4, "weight_decay": 0.01},
    "train": {
        "images": 120 * BATCH,
        "global_batch": BATCH,
        "ema": {"power": [0.05, 0.1]},
        "checkpoint": {"every_images": 10 * BATCH},
        "trackers": [],
        "gpu": False,
        "log_every_images": 10 * BATCH,
    },
    "eval": {"n_generated": 0},
}


def settings(storage: Path | str, **changes: Any) -> dict[str, Any]:
    """Return the settings above with `changes`, a section each, merged in; a value of None stays None."""
    return merge(SETTINGS | {"storage": str(storage)}, changes)


def experiment(storage: Path | str, **changes: Any) -> Experiment:
    """Return the settings as a run resolves them: its folder follows from the values chosen for "auto"."""
    e = validate(settings(storage, **changes))
    return settled(e, open_training_data(e))


def settings_file(storage: Path, **changes: Any) -> Path:
    path = storage / "small.yaml"
    path.write_text(yaml.safe_dump(settings(storage, **changes)))
    return path


def final_state(run_folder: str) -> dict[str, str]:
    """SHA-256 of every tensor file of the newest checkpoint: equal where weights, averages and optimizer are equal
    to the bit."""
    newest = ck.list_checkpoints(run_folder)[-1]
    ck.verify(newest)
    return {name: info.sha256 for name, info in ck.files_of(newest).items() if name.endswith(".safetensors")}


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "RAY_USAGE_STATS_ENABLED": "0", **more}


def kill_all(process: subprocess.Popen[Any]) -> None:
    """SIGKILL to the command; its private Ray ends with it, and what remains of it is killed too."""
    children = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.wait()
    psutil.wait_procs(children, timeout=5)
    for child in children:
        if child.is_running():
            child.kill()
    psutil.wait_procs(children, timeout=10)


def wait_for(condition: Any, seconds: float = 240) -> Any:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if value := condition():
            return value
        time.sleep(0.05)
    raise AssertionError(f"not within {seconds:.0f} s")
