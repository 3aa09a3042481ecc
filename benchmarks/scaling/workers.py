"""Ray Train with many real workers of a tiny network on this machine: start, controller and recovery."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil

from benchmarks.common.measure import wait_for

WORKERS = (16, 32)
PATIENCE = 900.0  # seconds


def measure_workers() -> list[dict[str, Any]]:
    """Train with each number of workers; kill one of them with SIGKILL once there is a checkpoint."""
    return [_measure(workers) for workers in WORKERS]


def _measure(workers: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        settings = [
            f"storage={folder}",
            f"train.workers={workers}",
            f"train.global_batch={workers}",
            "data.resolution=8",
        ]
        settings += ["train.images=100000000", "train.flops=null", "eval.n_generated=0", "train.compile=false"]
        settings += ["train.checkpoint.every_images=320", f"train.log_every_images={workers}", "train.trackers=[]"]
        settings += ["model.model_channels=16", "model.channel_mult=[1]", "model.num_blocks=1"]
        log = Path(folder, "log")
        started = time.perf_counter()
        with log.open("w") as file:
            command = [sys.executable, "-m", "diffscale.train", "quickstart-unet", *settings]
            train = psutil.Popen(command, stdout=file, stderr=file, env=os.environ)
        try:
            wait_for(lambda: _checkpoints(folder), PATIENCE, f"first checkpoint of {workers}: {log.read_text()[-500:]}")
            first = time.perf_counter() - started
            controller = _named(train, "TrainController")
            before, since = sum(controller.cpu_times()[:2]), time.perf_counter()
            time.sleep(30)
            share = (sum(controller.cpu_times()[:2]) - before) / (time.perf_counter() - since)
            victim = _named(train, "RayTrainWorker")
            seen = max(_checkpoints(folder))
            killed = time.perf_counter()
            victim.send_signal(signal.SIGKILL)
            wait_for(lambda: max(_checkpoints(folder)) > seen + 320, PATIENCE, "a checkpoint after the kill")
            recovered = time.perf_counter() - killed
        finally:
            train.send_signal(signal.SIGINT)
            try:
                train.wait(120)
            except (psutil.TimeoutExpired, subprocess.TimeoutExpired):
                train.kill()
    return {
        "workers": workers,
        "first_checkpoint_s": round(first, 1),
        "controller_cpu_share": round(share, 3),
        "recovery_s": round(recovered, 1),
        "load_of_the_machine": round(os.getloadavg()[1], 1),
    }


def _checkpoints(folder: str) -> list[int]:
    return sorted(int(mark.parent.name.split("-")[-1]) for mark in Path(folder).glob("runs/*/checkpoints/*/COMPLETE"))


def _named(command: psutil.Process, title: str) -> psutil.Process:
    """Return a process that the command has started, by a part of its title."""
    return next(p for p in command.children(recursive=True) if title in " ".join(p.cmdline()))
