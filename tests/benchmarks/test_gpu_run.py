"""The runs that are prepared for a GPU work where there is none, at toy sizes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.throughput.compile_rules import NETWORKS, rules_of
from benchmarks.throughput.gpu import CELLS
from diffscale.training.compile_rules import Rule


def dry_run(module: str, out: Path, *options: str) -> list[dict[str, Any]]:
    command = [sys.executable, "-m", f"benchmarks.throughput.{module}", "--dry-run", *options]
    environment = os.environ | {"OUT": str(out), "OMP_NUM_THREADS": "1"}
    subprocess.run(command, env=environment, check=True, timeout=900, capture_output=True)
    return [json.loads(line) for line in (out / "gpu.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_a_cell_leaves_its_rows_and_then_how_it_ended(tmp_path: Path) -> None:
    rows = dry_run("gpu", tmp_path, "--only", "unet-tiny")
    assert [row["cell"] for row in rows] == ["small waiting", "small ahead", "(unet-tiny)"]
    assert rows[-1]["ended"] == 0
    assert rows[0]["mfu_of_989"] is not None
    assert rows[0]["images_per_s"] > 0


def test_the_cells_fit_nine_minutes_as_far_as_the_aims_need_them() -> None:
    """What comes first is what the aims are about; the limits of these cells add up to less than 540 s."""
    wanted = ["probe", "unet-tiny", "dit-mini", "rin-tiny", "uvit-tiny", "dit-xl-2", "exact", "peers", "sampling"]
    assert list(CELLS)[: len(wanted)] == wanted
    assert sum(CELLS[name][0] for name in wanted) <= 540


@pytest.mark.slow
def test_rules_of_compilation_follow_from_a_dry_run(tmp_path: Path) -> None:
    rows = dry_run("compile_rules", tmp_path, "--only", "dit")
    assert [row["network"] for row in rows] == ["dit-mini"] * len(NETWORKS["dit"])
    assert all(row["ms_eager"] > 0 and row["ms_compiled"] > 0 for row in rows)


def test_a_rule_is_the_size_from_which_every_measured_network_gains() -> None:
    gains = {10: 1.3, 20: 1.0, 30: 1.06, 40: 1.2}  # the smallest gains too, but one above it does not
    rows = [{"backbone": "dit", "parameters": n, "ms_eager": g, "ms_compiled": 1.0} for n, g in gains.items()]
    rows.append({"backbone": "rin", "parameters": 5, "ms_eager": 1.0, "ms_compiled": 1.0})
    assert rules_of(rows, "H200", "") == [Rule("H200", "dit", 30, ""), Rule("H200", "rin", None, "")]


@pytest.mark.slow
def test_every_cell_runs(tmp_path: Path) -> None:
    rows = dry_run("gpu", tmp_path, "--seconds", "900")
    assert {row["cell"]: row["ended"] for row in rows if "ended" in row} == {f"({name})": 0 for name in CELLS}


@pytest.mark.slow
def test_cifar10_trains_and_is_evaluated(tmp_path: Path) -> None:
    rows = dry_run("gpu_cifar10", tmp_path)
    assert [row["network"] for row in rows] == ["unet-cifar10", "dit-cifar10"]
    assert all(row["reason"] == "finished" and row["fd_efficientnet_lite0"] > 0 for row in rows)
