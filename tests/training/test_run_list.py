"""The list of runs and the report are one command away from any storage."""

from __future__ import annotations

from pathlib import Path

import pytest

from diffscale.data import Dataset
from diffscale.records.store import read_records
from tests.support.commands import run_command

from .test_trackers import EVAL, SEEN
from .test_trainer import launch, short


@pytest.mark.parametrize("named", [True, False], ids=["named", "DIFFSCALE_STORAGE"])
def test_runs_and_report_of_an_object_store(
    bucket: str, dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, named: bool
) -> None:
    place = f"{bucket}/listed-{named}"
    _, folder = launch(short(place, "listed", train={"images": SEEN[-1]}, eval=EVAL), dataset)
    best = min(record.value for record in read_records([folder]))
    monkeypatch.setenv("DIFFSCALE_STORAGE", place)
    monkeypatch.delenv("COLUMNS", raising=False)
    arguments = [place] if named else []
    runs = run_command("runs", *arguments)
    assert runs.code == 0, runs.err
    (line,) = (line for line in runs.out.splitlines() if "listed-" in line)
    assert f"{best:.5g}" in line, "a log is wide enough for a row"
    assert "100%" in line
    report = run_command("report", *arguments, "--out", str(tmp_path / "report"))
    assert report.code == 0, report.err
    assert "listed" in (tmp_path / "report" / "index.html").read_text(encoding="utf-8")
    assert not (Path.cwd() / "report").exists()
