"""`python -m benchmarks.report`: what it writes, the same every time, and errors that fit on one screen."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
from typer.testing import CliRunner

from diffscale.records.schema import Record
from diffscale.report import write_report
from diffscale.report.__main__ import app

from .records import make_record, write_runs

ROOT = Path(__file__).parents[2]
CSVS = {"fid_vs_compute", "facets", "points", "pareto", "scaling", "verdicts", "sweep", "cost"}


def test_writes_every_table_plot_and_the_page(report: Path) -> None:
    assert {p.stem for p in report.glob("*.csv")} == CSVS
    assert len(pd.read_csv(report / "fid_vs_compute.csv")) == 72 + 8 + 72
    names = {p.name for p in (report / "plots").iterdir()}
    for figure in ("fid_vs_compute", "fid_vs_wall_clock", "fid_vs_nfe", "scaling"):
        assert {f"{figure}.png", f"{figure}.svg"} <= names
    assert any(name.startswith("schedule_by_resolution-unet") for name in names)
    assert (report / "index.html").stat().st_size > 1_000_000


def test_columns_of_the_evaluations_are_the_records(report: Path) -> None:
    header = (report / "fid_vs_compute.csv").read_text().splitlines()[0].split(",")
    assert header == [*Record.model_fields, "facet", "recipe"]


def test_is_the_same_to_the_byte_when_made_again(storage: str, tmp_path: Path) -> None:
    runs = [str(run) for run in sorted((Path(storage) / "runs").glob("r*-32-*"))]
    for name in ("once", "again"):
        write_report(runs, tmp_path / name)
    first = [path for path in (tmp_path / "once").rglob("*") if path.is_file()]
    assert len(first) > 12
    for path in first:
        assert path.read_bytes() == (tmp_path / "again" / path.relative_to(tmp_path / "once")).read_bytes(), path.name


def test_run_folders_and_record_files_can_be_named_one_by_one(storage: str, tmp_path: Path) -> None:
    runs = sorted((Path(storage) / "runs").glob("unet-simple_cosine-32-*"))
    analysis = write_report([str(runs[0]), str(next((runs[1] / "records").iterdir()))], tmp_path)
    assert analysis.rows["run_id"].nunique() == 2


def test_relative_places_are_read(storage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = write_runs(tmp_path / "few", [make_record(images_seen=4096 * 2**i) for i in range(3)])
    monkeypatch.chdir(Path(place))
    result = CliRunner().invoke(app, ["runs", "--out", "report"])
    assert result.exit_code == 0, result.output
    assert (Path(place) / "report" / "index.html").exists()
    assert "Best FID" in result.output


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks.report", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)


def test_a_damaged_record_is_named_on_one_screen(tmp_path: Path) -> None:
    place = write_runs(tmp_path, [make_record()], grids=False)
    (damaged,) = Path(place).rglob("*.json")
    damaged.write_text(damaged.read_text()[:100])
    result = run(place, "--out", str(tmp_path / "out"))
    assert result.returncode == 2
    assert damaged.name in result.stderr
    assert "Traceback" not in result.stderr
    assert len(result.stderr.splitlines()) < 12


@pytest.mark.parametrize("arguments", [["EMPTY"], ["/nowhere/at/all"], [], ["EMPTY", "--compare", "EMPTY", "EMPTY"]])
def test_nothing_to_report_is_a_user_error(arguments: list[str], tmp_path: Path) -> None:
    from diffscale.core.errors import UserError

    given = [str(tmp_path) if a == "EMPTY" else a for a in arguments]
    result = CliRunner().invoke(app, [*given, "--out", str(tmp_path / "out")])
    assert isinstance(result.exception, UserError), result.output


def test_a_damaged_or_foreign_sample_grid_is_left_out_and_named(tmp_path: Path) -> None:
    place = write_runs(tmp_path / "runs", [make_record(images_seen=4096 * 2**i) for i in range(3)])
    grids = sorted(Path(place).rglob("*.png"))
    grids[0].write_bytes(b"\x89PNG\r\n\x1a\n broken")
    grids[1].write_bytes(b"<svg onload='alert(1)'/>")
    write_report([place], tmp_path / "out")
    page = (tmp_path / "out" / "index.html").read_text()
    assert len(re.findall(r"data:image/webp;base64,", page)) == 1
    assert "Sample grids that do not open" in page


def test_one_single_record_makes_a_report(tmp_path: Path) -> None:
    place = write_runs(tmp_path / "runs", [make_record(value_low=None, value_high=None)])
    analysis = write_report([place], tmp_path / "out")
    assert [f["kind"] for f in analysis.findings] == ["best"]
    assert not list((tmp_path / "out" / "plots").iterdir())
