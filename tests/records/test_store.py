"""One immutable file per evaluation: nothing is lost, nothing is written twice, damage is named."""

from __future__ import annotations

import json
import math
import multiprocessing
from pathlib import Path

import pytest

from diffscale.core import storage
from diffscale.core.errors import UserError
from diffscale.records.schema import Record, record_id
from diffscale.records.store import read_records, records_of_run, to_frame, write_record


def make(**changes: object) -> Record:
    values = {
        "run_id": "r" * 16,
        "run_name": "run",
        "created": "2026-01-01T00:00:00+00:00",
        "model": "unet",
        "parameters": 10,
        "schedule": "simple_cosine",
        "interpolant": "vp",
        "prediction": "v",
        "weighting": "min_snr",
        "input_scale": 1.0,
        "dataset": "emoji",
        "dataset_hash": "d",
        "dataset_lossy": False,
        "train_resolution": 32,
        "seed": 0,
        "global_batch": 64,
        "precision": "bf16",
        "images_seen": 640,
        "epochs": 0.5,
        "endpoint": "constant",
        "ema": "halflife",
        "forward_macs": 1e6,
        "flops_per_image": 6e6,
        "train_flops": 3.84e9,
        "device_seconds": 1.0,
        "device": "cpu",
        "devices": 2,
        "metric": "fd_efficientnet_lite0",
        "value": 12.5,
        "network": "efficientnet_lite0",
        "resize": "bilinear",
        "eval_resolution": 32,
        "reference": "ref",
        "n_generated": 64,
        "n_reference": 100,
        "solver": "dpmpp_2m",
        "nfe": 10,
        "sampler": "{}",
        "sample_seed": 0,
        "sampling_flops": 1e7,
        "evaluated_on": "training workers",
        "commit": "c",
        "dirty": False,
        "versions": {},
        "settings": {"model.name": "unet"},
    } | changes
    keys = ("run_id", "images_seen", "ema", "sampler", "n_generated", "sample_seed", "reference", "metric")
    name = record_id(**{k: values[k] for k in keys}, eval_resolution=values["eval_resolution"])  # type: ignore[arg-type]
    return Record(**({"record_id": name} | values))  # type: ignore[arg-type]


def test_writing_twice_changes_nothing(tmp_path: Path) -> None:
    first = write_record(str(tmp_path), make())
    before = Path(first).stat().st_mtime_ns
    assert write_record(str(tmp_path), make(value=99.0)) == first
    assert Path(first).stat().st_mtime_ns == before
    assert [r.value for r in read_records([str(tmp_path)])] == [12.5]


def _write_many(folder: str) -> None:
    for images in range(0, 6400, 64):
        write_record(folder, make(images_seen=images))


def test_concurrent_writers_leave_whole_rows(tmp_path: Path) -> None:
    processes = [multiprocessing.Process(target=_write_many, args=(str(tmp_path),)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert len(read_records([str(tmp_path)])) == 100
    assert not list(tmp_path.rglob("*.tmp"))


def test_identity_covers_what_was_evaluated_and_not_what_came_out() -> None:
    assert make().record_id == make(value=1.0, device="cuda").record_id
    for change in ({"ema": "none"}, {"images_seen": 1}, {"metric": "fid"}, {"n_generated": 5}, {"sample_seed": 3}):
        assert make(**change).record_id != make().record_id


@pytest.mark.parametrize("text", ["", "{", "[]", '{"schema_version": 1}', '{"schema_version": 99}', "[" * 100_000])
def test_a_damaged_record_is_named(tmp_path: Path, text: str) -> None:
    file = tmp_path / "records" / "x.json"
    file.parent.mkdir()
    file.write_text(text)
    with pytest.raises(UserError, match=r"x\.json"):
        read_records([str(tmp_path)])


def test_a_place_without_runs_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nowhere"):
        read_records([str(tmp_path / "nowhere")])


def test_a_value_that_is_not_finite_survives(tmp_path: Path) -> None:
    uri = write_record(str(tmp_path), make(value=float("nan"), val_loss=float("inf")))
    assert json.loads(Path(uri).read_text())["value"] == "nan"
    (row,) = read_records([str(tmp_path)])
    assert math.isnan(row.value)
    assert row.val_loss == math.inf


def test_the_frame_has_every_column_in_order() -> None:
    assert list(to_frame([make()]).columns) == list(Record.model_fields)


def test_records_of_an_object_store_are_fetched_together_and_once(
    bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """10,000 records were 10,000 requests one after the other, in every report."""
    monkeypatch.setenv("DIFFSCALE_CACHE", str(tmp_path))
    runs = f"{bucket}/fetched_once"  # other modules write to the same server
    for images in range(40):
        write_record(f"{runs}/a", make(images_seen=images))
    read: list[str] = []
    original = storage.read_bytes
    monkeypatch.setattr(storage, "read_bytes", lambda uri: read.append(uri) or original(uri))
    assert [r.images_seen for r in read_records([runs])] == [*range(40)]
    assert len(read) == 40
    write_record(f"{runs}/b", make(run_id="b", images_seen=1))
    assert len(read_records([runs])) == len(records_of_run(f"{runs}/a")) + 1 == 41
    assert len(set(read)) == 41
    assert read.count(f"{runs}/a/records/{make(images_seen=3).record_id}.json") == 2  # another index
    index = next(tmp_path.glob("records/*.jsonl"))
    index.write_text("damaged")
    assert len(read_records([runs])) == 41


def test_a_run_has_one_name_whoever_evaluated_it(tmp_path: Path) -> None:
    """A sweep's trial that is an earlier run trains and evaluates it in its own folder, at other points too."""
    for name, minute, images in (("run", 1, 640), ("run", 2, 1280), ("sweep", 3, 1280), ("sweep", 4, 320)):
        record = make(run_name=name, images_seen=images, created=f"2026-01-01T00:0{minute}:00+00:00", value=minute)
        write_record(str(tmp_path / name), record)
    for places in (["run", "sweep"], ["sweep", "run"]):
        found = read_records([str(tmp_path / name) for name in places])
        assert [(r.run_name, r.images_seen, r.value) for r in found] == [
            ("run", 320, 4.0),
            ("run", 640, 1.0),
            ("run", 1280, 2.0),
        ]
    assert [r.run_name for r in read_records([str(tmp_path / "sweep")])] == ["sweep", "sweep"]
