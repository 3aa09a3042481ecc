"""A sweep that was interrupted produces the same result as an uninterrupted one."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import ray
from ray.cluster_utils import Cluster

from .small import ends, tune, write_sweep

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
LONGER = {"scheduler": {"name": "halving", "rungs_flops": [2.0e11, 4.0e11], "reduction": 3}}


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """How the trials end when nothing happens."""
    folder = tmp_path_factory.mktemp("calm")
    assert tune(write_sweep(folder, **LONGER)).wait(timeout=400) == 0
    return ends(folder)


def wait_for(what: Callable[[], object], process: subprocess.Popen, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert process.poll() is None, f"the sweep ended with {process.returncode} before it could be disturbed"
        assert time.monotonic() < end
        time.sleep(0.2)


def training(folder: Path) -> bool:
    """Return whether a trial has begun to train."""
    return any(f.stat().st_size for f in folder.glob("storage/runs/*/metrics.jsonl"))


def test_a_driver_killed_again_and_again_stops_the_same_trials(calm: dict[str, str], tmp_path: Path) -> None:
    sweep, code = write_sweep(tmp_path, **LONGER), None
    for patience in (15, 30, 45, 400):
        process = tune(sweep)
        try:
            code = process.wait(timeout=patience)
            break
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
    assert code == 0
    assert ends(tmp_path) == calm


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_a_checkpoint_of_every_running_trial(
    number: int, code: int, calm: dict[str, str], tmp_path: Path
) -> None:
    sweep = write_sweep(tmp_path, **LONGER)
    process = tune(sweep)
    wait_for(lambda: training(tmp_path), process)
    os.kill(process.pid, number)
    assert process.wait(timeout=60) == code
    begun = [f.parent for f in tmp_path.glob("storage/runs/*/metrics.jsonl")]
    assert begun
    assert all(list(run.glob("checkpoints/*/COMPLETE")) for run in begun)
    assert tune(sweep).wait(timeout=400) == 0
    assert ends(tmp_path) == calm


def test_a_trial_whose_process_dies_is_begun_again(calm: dict[str, str], tmp_path: Path) -> None:
    process = tune(write_sweep(tmp_path, **LONGER))
    wait_for(lambda: training(tmp_path), process)
    trials = [
        p for p in psutil.Process(process.pid).children(recursive=True) if "ImplicitFunc" in " ".join(p.cmdline())
    ]
    assert trials, "no trial's process was found"
    trials[0].kill()
    assert process.wait(timeout=400) == 0
    assert ends(tmp_path) == calm


def test_a_node_that_dies_takes_no_trial_with_it(calm: dict[str, str], tmp_path: Path) -> None:
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    try:
        other = cluster.add_node(num_cpus=2)
        process = tune(write_sweep(tmp_path, max_concurrent=2, **LONGER), environment={"RAY_ADDRESS": cluster.address})
        wait_for(lambda: training(tmp_path), process)
        cluster.remove_node(other, allow_graceful=False)
        assert process.wait(timeout=400) == 0
        assert ends(tmp_path) == calm
    finally:
        ray.shutdown()
        cluster.shutdown()
