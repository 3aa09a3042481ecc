"""`diffscale runs`: what is in a storage, how far it is, and the best value by the direction of its metric."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from diffscale.records.store import write_record
from diffscale.training.run_list import best_value, list_runs
from tests.records.test_store import make


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    rows = {"old": ("2026-01-01", "fid", (9.0, 7.0, 8.0)), "new": ("2026-02-01", "f_score", (0.2, 0.6, 0.4))}
    for name, (day, metric, values) in rows.items():
        for i, value in enumerate(values, 1):
            record = make(
                run_name=name, images_seen=100 * i, metric=metric, value=value, created=f"{day}T00:00:00+00:00"
            )
            write_record(str(tmp_path / "runs" / name), record)
    (tmp_path / "runs" / "empty").mkdir()
    return tmp_path


def test_newest_first_with_the_best_value(runs: Path) -> None:
    found = list_runs(str(runs))
    assert [(Path(r.folder).name, r.images_seen, r.metric, r.best) for r in found] == [
        ("new", 300, "f_score", 0.6),
        ("old", 300, "fid", 7.0),
    ]
    assert best_value([], "fid") is None


def test_command(runs: Path) -> None:
    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "diffscale", "runs", *arguments]
        return subprocess.run(
            command, capture_output=True, text=True, timeout=120, cwd=runs.parent, env=os.environ | {"COLUMNS": "120"}
        )

    shown = run(runs.name)
    assert shown.returncode == 0, shown.stderr
    lines = shown.stdout.splitlines()
    assert lines[1].split()[:2] == ["new", "300"]
    assert "fid 7" in lines[2]
    missing = run("nowhere")
    assert missing.returncode == 2
    assert "STORAGE" in missing.stderr


def test_the_best_of_a_run_is_of_its_own_evaluations(tmp_path: Path) -> None:
    """A value of 300 samples was the best of a run that evaluates 32, and nan could be the best of any."""
    folder = tmp_path / "runs" / "run"
    for day, value, n in ((1, 9.0, 32), (2, math.nan, 32), (3, 8.0, 32), (4, 1.0, 300)):
        created = f"2026-01-0{day}T00:00:00+00:00"
        write_record(str(folder), make(images_seen=day, value=value, n_generated=n, created=created))
    (found,) = list_runs(str(tmp_path))
    assert found.best == 8.0
