"""The history: each interval once."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from benchmarks.reliability.killed_runs import VARYING
from diffscale.core import storage
from diffscale.data import Dataset
from diffscale.training.checkpoint import layout as ck
from diffscale.training.metrics_log import History, read_history

from .small import BATCH, environment, kill_all, settings, wait_for
from .test_trainer import launch, short


@pytest.mark.parametrize("remote", [False, True])
def test_a_resumed_history_has_each_interval_once(tmp_path: Path, bucket: str, remote: bool) -> None:
    folder = f"{bucket}/history" if remote else str(tmp_path)
    first = History(folder, 0)
    for images in (10, 20, 30):
        first.append({"images_seen": images, "launch": 1})
    first.flush()
    second = History(folder, 20)  # the checkpoint that is resumed from
    second.append({"images_seen": 30, "launch": 2})
    second.flush()
    assert [(row["images_seen"], row["launch"]) for row in read_history(folder)] == [(10, 1), (20, 1), (30, 2)]


def test_a_resumed_run_has_the_history_of_the_calm_run(shared_storage: Path, dataset: Dataset) -> None:
    """It stops within an interval; the row of that interval averages the steps before and after."""
    _, calm = launch(short(shared_storage, "calm-history"), dataset)
    for images in (13, 26, 30):
        e = short(shared_storage, "resumed-history", train={"images": images * BATCH})
        _, resumed = launch(e, dataset)
    assert timeless(read_history(resumed)) == timeless(read_history(calm))


@pytest.mark.slow
def test_a_run_in_an_object_store_keeps_its_history_when_it_is_killed(tmp_path: Path, bucket: str) -> None:
    """The rows before a checkpoint are there when the checkpoint is, though the store cannot append."""
    for name in ("calm", "killed"):
        file = tmp_path / "small.yaml"
        file.write_text(yaml.safe_dump(settings(bucket, name=name, train={"images": 100 * BATCH})))
        command = [sys.executable, "-m", "diffscale.train", str(file)]
        process = subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        if name == "killed":
            wait_for(lambda: any("images-000000120" in c for c in checkpoints(bucket, "killed")))
            kill_all(process)
            process = subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        output = process.communicate(timeout=200)[0]
        assert process.returncode == 0, output
    calm, killed = (read_history(run_of(bucket, name)) for name in ("calm", "killed"))
    assert timeless(killed) == timeless(calm)


def run_of(place: str, name: str) -> str:
    found = {uri.partition("/checkpoints/")[0] for uri in storage.list_files(f"{place}/runs", ".json", recursive=True)}
    return next(uri for uri in sorted(found) if f"/runs/{name}-" in uri)


def checkpoints(place: str, name: str) -> list[str]:
    files = storage.list_files(f"{place}/runs", ck.COMPLETE, recursive=True)
    return [uri for uri in files if f"/runs/{name}-" in uri]


def timeless(rows: list[dict[str, float]]) -> list[dict[str, float]]:
    """Return the history without what depends on the machine's speed and memory."""
    return [{k: v for k, v in row.items() if k not in VARYING} for row in rows]


def test_a_line_that_a_crash_cut_off_is_dropped(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"images_seen": 10}\n{"images_se')
    History(str(tmp_path), 20).append({"images_seen": 20})
    assert [row["images_seen"] for row in read_history(str(tmp_path))] == [10, 20]
