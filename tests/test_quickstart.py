"""The quickstart's report holds every row: 3 backbones at 3 compute points, and the 4 runs of the sweep.

DIFFSCALE_QUICKSTART_CSV names the report of a quickstart that has run already, as in `.ci/run`.
"""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest

from diffscale.config.factory import open_training_data
from diffscale.config.load import load_experiment
from diffscale.quickstart import BUDGETS, budget_for, lessons
from diffscale.records.schema import Record
from tests.report.records import make_record

BACKBONES = ("few-emoji-unet", "few-emoji-uvit", "few-emoji-rin")


COMMAND = [sys.executable, "-m", "diffscale.quickstart", "--size", "smallest"]


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the report's folder of a quickstart that ran in the folder above it."""
    if file := os.environ.get("DIFFSCALE_QUICKSTART_CSV"):
        return Path(file).parent
    folder = tmp_path_factory.mktemp("quickstart")
    subprocess.run(COMMAND, cwd=folder, check=True, timeout=800)
    return folder / "report"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_report_of_the_quickstart_has_every_row(report: Path) -> None:
    with open(report / "fid_vs_compute.csv", newline="") as opened:
        rows = list(csv.DictReader(opened))
    points, runs = defaultdict(set), defaultdict(set)
    for row in rows:  # the sweep's trial that is the UNet's run has its name
        points[row["run_id"]].add(row["images_seen"])
        runs[row["run_name"]].add(row["run_id"])
    for name in BACKBONES:
        assert [len(points[run]) >= 3 for run in runs[name]] == [True], name
    assert len(runs["quickstart-sweep"]) == 3
    assert len({row["run_id"] for row in rows}) == 6
    assert all(row["value"] for row in rows)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_second_quickstart_trains_nothing_and_says_what_it_reused(report: Path) -> None:
    before = (report / "fid_vs_compute.csv").read_bytes()
    second = subprocess.run(COMMAND, cwd=report.parent, check=True, timeout=300, capture_output=True, text=True)
    assert "reused every run, from quickstart/" in second.stdout
    assert (report / "fid_vs_compute.csv").read_bytes() == before


def test_the_budget_follows_from_the_machine_once_and_a_second_call_keeps_it(tmp_path: Path) -> None:
    experiment = load_experiment("few-emoji-rin", [f"storage={tmp_path}"])
    data = open_training_data(experiment)
    file = tmp_path / "budget.json"
    chosen = budget_for(file, 6.0, experiment, data)
    assert chosen in BUDGETS
    file.write_text(json.dumps({"minutes": 6.0, "flops": 1e10}))
    assert budget_for(file, 6.0, experiment, data) == 1e10
    assert budget_for(file, 1e6, experiment, data) == BUDGETS[0]  # no longer than the presets say


def evaluation(run: str, resolution: int, schedule: str, images: int, value: float) -> Record:
    return make_record(
        model=run,
        resolution=resolution,
        schedule=schedule,
        images_seen=images,
        train_flops=1e9 * images,
        metric="fd_efficientnet_lite0",
        memorisation=0.25,
        value=value,
    )


def test_the_lessons_compare_the_ends_of_the_backbones_and_both_ends_of_the_sweep() -> None:
    unet = [evaluation("unet", 16, "cosine", 100, 900.0), evaluation("unet", 16, "cosine", 400, 300.0)]
    trials = {(8, "cosine"): (500.0, 450.0), (16, "cosine"): (800.0, 350.0), (16, "linear"): (810.0, 360.0)}
    backbones, sweep = lessons(
        [unet, [evaluation("uvit", 16, "cosine", 400, 200.0)]],
        [
            [evaluation("unet", *settings, images, value) for images, value in zip((100, 400), values, strict=True)]
            for settings, values in trials.items()
        ],
    )
    assert "4.0e+11 FLOPs uvit 200, unet 300" in backbones
    assert "25% of uvit's samples" in backbones
    assert "8 pixels lead after 1.0e+11 FLOPs (500), 16 pixels after 4.0e+11 (350)" in sweep
    assert "cosine 350, linear 360" in sweep
