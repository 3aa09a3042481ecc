"""Evaluation in a separate Ray Train task: it writes the records that the training workers would write."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from diffscale.config.experiment import Experiment
from diffscale.core.errors import UserError
from diffscale.records.schema import Record
from diffscale.records.store import read_records
from diffscale.training.async_evaluation import wanted
from diffscale.training.async_evaluation_task import evaluate_images
from diffscale.training.run import train

from .small import BATCH, environment, experiment, settings_file, wait_for

EVALUATED: dict[str, Any] = {"n_generated": 16, "n_reference": 32, "points": [0.5, 1.0], "batch": 16, "grid_images": 4}
OF_THE_LAUNCH = ("run_name", "created", "device_seconds", "evaluated_on", "settings")


def evaluated(storage: Path, name: str, by: str, **train_settings: Any) -> Experiment:
    settings = {"images": 40 * BATCH, "checkpoint": {"keep_last": 1}, **train_settings}
    return experiment(storage, name=name, train=settings, eval=EVALUATED | {"workers": by})


def comparable(record: Record) -> dict[str, Any]:
    return {k: v for k, v in record.model_dump().items() if k not in OF_THE_LAUNCH}


def task_of(process: psutil.Process) -> psutil.Process | None:
    """Ray Train's validation task below a process."""
    for child in process.children(recursive=True):
        try:
            if "run_validation_fn" in " ".join(child.cmdline()):
                return child
        except psutil.Error:
            continue
    return None


@pytest.mark.slow
def test_own_workers_write_the_records_of_training_workers(shared_storage: Path, private_ray: None) -> None:
    """One task is killed on the way: Ray starts it again."""
    results = [train(evaluated(shared_storage, "by-workers", "training"), show=False)]

    def kill() -> None:
        wait_for(lambda: task_of(psutil.Process())).send_signal(signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    results.append(train(evaluated(shared_storage, "by-a-task", "own"), show=False))
    killer.join(timeout=5)
    assert not killer.is_alive()
    assert [result.reason for result in results] == ["finished", "finished"]
    theirs, ours = (read_records([result.run_folder]) for result in results)
    assert [record.images_seen for record in ours] == [20 * BATCH, 40 * BATCH]
    assert {record.evaluated_on for record in theirs} == {"training workers"}
    assert {record.evaluated_on for record in ours} == {"own workers"}
    assert [comparable(record) for record in ours] == [comparable(record) for record in theirs]
    folder = Path(results[1].run_folder)
    assert len(list((folder / "samples").glob("*.png"))) == 2


@pytest.mark.slow
def test_a_task_with_several_devices_writes_the_same_records(shared_storage: Path, private_ray: None) -> None:
    """Two Ray actors draw the three chunks of samples."""
    settings = EVALUATED | {"n_generated": 150, "points": [1.0], "workers": "training"}
    e = experiment(shared_storage, name="devices", train={"images": 2 * BATCH}, eval=settings)
    result = train(e, show=False, here=True)
    theirs = read_records([result.run_folder])
    for file in Path(result.run_folder, "records").iterdir():
        file.unlink()
    several = e.model_copy(update={"eval": e.eval.model_copy(update={"devices": 2})})
    config = {"experiment": several.model_dump_json(), "run_folder": result.run_folder, "launch": "l", "gpu": False}
    evaluate_images(config, 2 * BATCH)
    ours = read_records([result.run_folder])
    assert {record.evaluated_on for record in ours} == {"own workers"}
    assert [comparable(record) for record in ours] == [comparable(record) for record in theirs]


@pytest.mark.slow
def test_a_run_without_a_free_device_is_evaluated_by_its_workers(shared_storage: Path, private_ray: None) -> None:
    alone = evaluated(shared_storage, "one", "auto")
    assert wait_for(lambda: wanted(alone, gpu=False, deciding=False), 30)  # Ray counts freed devices with some delay
    assert not wanted(evaluated(shared_storage, "two", "auto", workers=2), gpu=False, deciding=False)
    assert not wanted(evaluated(shared_storage, "sweep", "auto"), gpu=False, deciding=True)
    with pytest.raises(UserError, match="a GPU besides"):
        wanted(evaluated(shared_storage, "gpu", "own"), gpu=True, deciding=False)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(("name", "batches", "points"), [("left", 400, [0.25, 0.5, 1.0]), ("done", 10, [1.0])])
def test_the_next_launch_runs_evaluations_that_the_last_one_left_out(
    shared_storage: Path, name: str, batches: int, points: list[float]
) -> None:
    """SIGTERM does not wait for them, during the training and after it; the same command does."""
    settings = EVALUATED | {"workers": "own", "n_generated": 512, "points": points}
    path = settings_file(shared_storage, name=name, eval=settings, train={"images": batches * BATCH})
    command = [sys.executable, "-m", "diffscale.train", str(path)]
    process = subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    wait_for(lambda: task_of(psutil.Process(process.pid)))
    if name == "done":
        time.sleep(3)  # the workers have ended
    process.send_signal(signal.SIGTERM)
    requested = time.monotonic()
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 143, output
    assert time.monotonic() - requested < 15
    folder = str(next((shared_storage / "runs").glob(f"{name}-*")))
    again = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=280, check=False)
    assert again.returncode == 0, again.stdout + again.stderr
    assert [record.images_seen for record in read_records([folder])] == [point * batches * BATCH for point in points]
