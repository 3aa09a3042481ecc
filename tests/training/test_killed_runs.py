"""Real runs through Ray Train, interrupted for real: what is left at the end must be what was without interruption."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from diffscale.training.checkpoint import layout as ck
from diffscale.training.metrics_log import read_history
from diffscale.training.run import train

from .small import BATCH, environment, experiment, final_state, kill_all, settings_file, wait_for

WORKERS = {"workers": 2}
RESUMABLE = 143


@pytest.fixture(scope="module")
def uninterrupted(shared_storage: Path, private_ray: None) -> dict[str, str]:
    result = train(experiment(shared_storage, name="whole", train=WORKERS), show=False)
    assert result.finished
    return final_state(result.run_folder)


def seen(run_folder: str) -> int:
    rows = read_history(run_folder)
    return rows[-1]["images_seen"] if rows else 0


def workers_of(process: psutil.Process) -> list[psutil.Process]:
    """The Ray Train workers below a process."""
    found = []
    for child in process.children(recursive=True):
        try:
            if "RayTrainWorker" in child.name() or "RayTrainWorker" in " ".join(child.cmdline()):
                found.append(child)
        except psutil.Error:
            continue
    return found


def kill_a_worker(run_folder: str, after_images: int, choice: random.Random) -> None:
    wait_for(lambda: seen(run_folder) >= after_images)
    time.sleep(choice.random() * 0.3)
    choice.choice(workers_of(psutil.Process())).send_signal(signal.SIGKILL)


def run_killing_workers(storage: Path, name: str, moments: list[int], seed: int) -> str:
    from diffscale.config.factory import open_training_data

    e = experiment(storage, name=name, train=WORKERS)
    folder = e.run_folder(open_training_data(e).content_hash)
    choice = random.Random(seed)

    def killer() -> None:
        for images in moments:
            kill_a_worker(folder, images, choice)

    thread = threading.Thread(target=killer, daemon=True)
    thread.start()
    result = train(e, show=False)
    thread.join(timeout=5)
    assert result.finished
    assert not thread.is_alive()
    return folder


@pytest.mark.slow
@pytest.mark.gate
def test_a_killed_worker_leaves_the_same_weights(shared_storage: Path, uninterrupted: dict[str, str]) -> None:
    folder = run_killing_workers(shared_storage, "worker", [30 * BATCH], seed=0)
    assert final_state(folder) == uninterrupted


def start(storage: Path, *overrides: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "diffscale.train", str(storage / "small.yaml"), *overrides]
    return subprocess.Popen(
        command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )


@pytest.mark.timeout(900)
@pytest.mark.slow
@pytest.mark.gate
def test_sigterm_and_a_killed_command_leave_the_same_weights(
    shared_storage: Path, uninterrupted: dict[str, str]
) -> None:
    settings_file(shared_storage, name="command", train=WORKERS)

    def folders() -> list[Path]:
        return sorted((shared_storage / "runs").glob("command-*"))

    process = start(shared_storage)
    folder = str(wait_for(folders)[0])
    wait_for(lambda: seen(folder) >= 20 * BATCH)
    process.send_signal(signal.SIGTERM)
    asked = time.time()
    wait_for(lambda: "stopped" in ((process.poll() is not None and "stopped") or ""), 60)
    assert process.returncode == RESUMABLE
    output = process.communicate()[0]
    assert "the same command resumes" in output
    newest = ck.list_checkpoints(folder)[-1]
    assert os.stat(Path(newest) / ck.COMPLETE).st_mtime - asked < 10

    process = start(shared_storage)
    before = ck.images_of(newest)
    wait_for(lambda: seen(folder) >= before + 25 * BATCH)
    kill_all(process)

    process = start(shared_storage)
    output = process.communicate(timeout=280)[0]
    assert process.returncode == 0, output
    assert final_state(folder) == uninterrupted
    images = [row["images_seen"] for row in read_history(folder)]
    assert images == sorted(set(images))

    again = start(shared_storage)
    output = again.communicate(timeout=120)[0]
    assert again.returncode == 0
    assert "already finished" in output


@pytest.mark.slow
def test_the_same_command_computes_the_same_on_a_busy_machine(tmp_path: Path) -> None:
    """How a run computes is a rule: neighbours on every core change neither its identity nor its weights."""
    left = []
    for name, neighbours in (("quiet", 0), ("busy", 2 * (os.cpu_count() or 1))):
        settings_file(tmp_path, name=name, train={"images": 40 * BATCH})
        busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(neighbours)]
        try:
            assert start(tmp_path).wait(280) == 0
        finally:
            for process in busy:
                process.kill()
                process.wait()
        (folder,) = (tmp_path / "runs").glob(f"{name}-*")
        left.append((folder.name.removeprefix(name), final_state(str(folder))))
    assert left[0] == left[1]


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_workers_commands_and_nodes_killed_at_random_moments_leave_the_same_weights(tmp_path: Path) -> None:
    """The default command, killed three times; benchmarks.reliability.killed_runs has every way to compute."""
    command = [
        sys.executable,
        "-m",
        "benchmarks.reliability.killed_runs",
        "defaults",
        "--out",
        str(tmp_path / "kills.csv"),
    ]
    root = Path(__file__).parents[2]
    done = subprocess.run(
        command, env=environment(), cwd=root, capture_output=True, text=True, timeout=900, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    table = (tmp_path / "kills.csv").read_text()
    assert table.count(",identical,") == 3
    assert all(f",{kind}," in table for kind in ("worker", "command", "node"))


@pytest.mark.slow
def test_a_hung_rank_is_noticed_and_the_run_resumes(
    shared_storage: Path, uninterrupted: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from diffscale.config.factory import open_training_data

    e = experiment(shared_storage, name="hung", train=WORKERS)
    folder = e.run_folder(open_training_data(e).content_hash)
    monkeypatch.setenv("DIFFSCALE_HANG_SECONDS", "8")

    def stop_one() -> None:
        wait_for(lambda: seen(folder) >= 30 * BATCH)
        workers_of(psutil.Process())[0].send_signal(signal.SIGSTOP)

    thread = threading.Thread(target=stop_one, daemon=True)
    thread.start()
    result = train(e, show=False)
    thread.join(timeout=5)
    assert result.finished
    assert final_state(folder) == uninterrupted
    assert os.listdir(Path(folder) / "hangs")
