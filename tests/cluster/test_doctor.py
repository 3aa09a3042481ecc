"""doctor as a command: it passes on this machine, and fails with a fix where the storage cannot be written."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest


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
