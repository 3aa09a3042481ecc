"""doctor as a command: it passes on this machine, and fails with a fix where the storage cannot be written."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest

from tests.support.commands import ray_runs, run_command

DRY_RUN = ("diffscale.train", "--dry-run")


@pytest.mark.parametrize("storage_exists", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_the_command_passes_on_this_machine_and_fails_where_it_cannot_write(tmp_path, storage_exists):
    """The command runs in its own process, on a private Ray. Nobody can create a folder in /proc, root included."""
    place = str(tmp_path / "storage") if storage_exists else "/proc/diffscale"
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    environment |= {"HOME": str(tmp_path), "OMP_NUM_THREADS": "1", "COLUMNS": "140"}
    command = [sys.executable, "-m", "diffscale.doctor", "--storage", place]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    output = done.stdout + done.stderr
    assert "Traceback" not in output
    assert done.returncode == (0 if storage_exists else 1), output
    assert "all-reduce" in output
    if storage_exists:
        assert not list((tmp_path / "storage").iterdir()), "the probe files are removed"
    token = tmp_path / ".ray" / "auth_token"
    if token.exists():
        assert token.read_text().strip() not in output


@pytest.mark.slow
def test_doctor_and_a_dry_run_print_one_estimate_of_memory(tmp_path):
    """Activations are most of it, and micro-batches make it smaller."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    environment |= {"HOME": str(tmp_path), "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    settings = ["quickstart-unet", f"storage={tmp_path}", "train.micro_batch=8"]

    def printed(*command: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", *command], capture_output=True, text=True, env=environment, timeout=280, check=True
        )
        return " ".join(done.stdout.split())

    (estimate,) = re.findall(r"# memory (about .*? of activations in passes of 8 images)", printed(*DRY_RUN, *settings))
    shown = re.sub(r"\s+", "", printed("diffscale.doctor", *settings))
    assert estimate.replace(" ", "") in shown


def test_a_network_that_does_not_fit_the_data_is_refused_before_ray_starts(tmp_path):
    before = ray_runs()
    changes = ("data.path=builtin:emoji", f"storage={tmp_path}", "diffusion.variance=learned_range")
    ended = run_command("doctor", "ddpm-cifar10", *changes)
    assert ended.code == 2
    assert "model.out_channels=6" in ended.err
    assert ray_runs() == before
