"""Ray Train with many real workers of a tiny network on this machine: start, controller and recovery."""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from benchmarks.common.measure import wait_for
from diffscale.data import resolve

WORKERS = (16, 32)
PATIENCE = 900.0  # seconds
STEPS = 20  # between checkpoints
RESOLUTION = 8


def measure_workers(numbers: tuple[int, ...] = WORKERS) -> list[dict[str, Any]]:
    """Train with each number of workers; kill one of them with SIGKILL once there is a checkpoint."""
    return [_measure(workers) for workers in numbers]


def _measure(workers: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        resolve("builtin:emoji", RESOLUTION, folder)  # built before the clock starts
        settings = [
            f"storage={folder}",
            f"train.workers={workers}",
            f"train.global_batch={workers}",
            f"data.resolution={RESOLUTION}",
        ]
        settings += ["train.images=100000000", "train.flops=null", "eval.n_generated=0", "train.compile=false"]
        settings += ["train.precision=fp32", "train.winograd=false", "train.trackers=[]"]
        settings += [f"train.checkpoint.every_images={STEPS * workers}", f"train.log_every_images={workers}"]
        settings += ["model.model_channels=16", "model.channel_mult=[1]", "model.num_blocks=1"]
        log = Path(folder, "log")
        started = time.perf_counter()
        with log.open("w") as file:
            command = [sys.executable, "-m", "diffscale.train", "quickstart-unet", *settings]
            train = psutil.Popen(command, stdout=file, stderr=file, env=os.environ)

        def until(condition: Callable[[], Any], what: str) -> None:
            """Wait for a condition, and say what the command printed if it ends before."""
            wait_for(lambda: condition() or train.poll() is not None, PATIENCE, what, 0.1)
            if train.poll() is not None:
                raise RuntimeError(f"the command ended before the {what}: {log.read_text()[-2000:]}")

        try:
            until(lambda: _steps(folder), "first step")
            first = time.perf_counter() - started
            processor = [sum(worker.cpu_times()[:2]) for worker in _all_named(train, "RayTrainWorker")]
            until(lambda: _checkpoints(folder), "first checkpoint")
            controller = _named(train, "TrainController")
            before, since = sum(controller.cpu_times()[:2]), time.perf_counter()
            time.sleep(30)
            share = (sum(controller.cpu_times()[:2]) - before) / (time.perf_counter() - since)
            memory = sum(p.memory_info().rss for p in train.children(recursive=True)) / 2**20
            seen = max(_checkpoints(folder))
            killed = time.perf_counter()
            _named(train, "RayTrainWorker").send_signal(signal.SIGKILL)
            until(lambda: max(_checkpoints(folder)) > seen + STEPS * workers, "checkpoint after the kill")
            recovered = time.perf_counter() - killed
        finally:
            train.send_signal(signal.SIGINT)
            try:
                train.wait(120)
            except psutil.TimeoutExpired:
                train.kill()
    return {
        "workers": workers,
        "first_step_s": round(first, 1),
        "cpu_s_of_a_worker_to_its_first_step": round(sum(processor) / len(processor), 1),
        "controller_cpu_share": round(share, 3),
        "recovery_s": round(recovered, 1),
        "memory_mb": round(memory),
        "load_of_the_machine": round(os.getloadavg()[1], 1),
    }


def _steps(folder: str) -> bool:
    """Return whether the history has a row, which it gets after every step."""
    return any(file.stat().st_size for file in Path(folder).glob("runs/*/metrics.jsonl"))


def _checkpoints(folder: str) -> list[int]:
    return sorted(int(mark.parent.name.split("-")[-1]) for mark in Path(folder).glob("runs/*/checkpoints/*/COMPLETE"))


def _named(command: psutil.Process, title: str) -> psutil.Process:
    return _all_named(command, title)[0]


def _all_named(command: psutil.Process, title: str) -> list[psutil.Process]:
    """Return the processes that the command has started, by a part of their titles."""
    return [p for p in command.children(recursive=True) if title in " ".join(p.cmdline())]
