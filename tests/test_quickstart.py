"""The quickstart's report holds every row: 3 backbones at 3 compute points, and the 4 runs of the sweep.

DIFFSCALE_QUICKSTART_CSV names the report of a quickstart that has run already, as in `.ci/run`.
"""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest

BACKBONES = ("few-emoji-unet", "few-emoji-uvit", "few-emoji-rin")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_report_of_the_quickstart_has_every_row(tmp_path: Path) -> None:
    file = Path(os.environ.get("DIFFSCALE_QUICKSTART_CSV") or tmp_path / "report" / "fid_vs_compute.csv")
    if not file.exists():
        command = [sys.executable, "-m", "diffscale.quickstart", "--size", "smallest"]
        subprocess.run(command, cwd=tmp_path, check=True, timeout=800)
    with open(file, newline="") as opened:
        rows = list(csv.DictReader(opened))
    points = defaultdict(set)
    for row in rows:
        points[row["run_name"]].add(row["images_seen"])
    assert {name: len(points[name]) >= 3 for name in BACKBONES} == dict.fromkeys(BACKBONES, True)
    assert len({row["run_id"] for row in rows if row["run_name"] == "quickstart-sweep"}) == 4
    assert all(row["value"] for row in rows)
