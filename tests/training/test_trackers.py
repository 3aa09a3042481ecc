"""The trackers have the history, the pictures and the settings of a run, offline and with the real packages."""

from __future__ import annotations

import importlib.util
import io
import json
import struct
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from diffscale.core.errors import UserError
from diffscale.data import Dataset
from diffscale.training.metrics_log import read_history
from diffscale.training.trackers import TrackedRun, make_trackers

from .small import BATCH, experiment, wait_for
from .test_trainer import launch

EVAL = {
    "n_generated": 16,
    "n_reference": 32,
    "points": [0.5, 1.0],
    "grid_images": 4,
    "metrics": ["fd_efficientnet_lite0"],
    "solver": {"name": "ddim", "steps": 3},
}
SEEN = [10 * BATCH, 20 * BATCH]
WANDB_HEADER = 7  # bytes before its records


def tracked(storage: Path, dataset: Dataset, name: str, **tracker: Any) -> tuple[str, list[dict[str, float]]]:
    """Train a run that a tracker follows; return its folder and history."""
    train = {"images": 20 * BATCH, "trackers": [name], "tracker": {"trajectories": 2, **tracker}}
    _, folder = launch(experiment(storage, name=f"tracked-{name}", train=train, eval=EVAL), dataset)
    return folder, read_history(folder)


def stored(folder: str, kind: str, images: int) -> Image.Image:
    return Image.open(Path(folder) / kind / f"images-{images:09d}.png").convert("RGB")


def test_tensorboard(shared_storage: Path, dataset: Dataset) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder, rows = tracked(shared_storage, dataset, "tensorboard")
    events = EventAccumulator(f"{folder}/tensorboard")
    events.Reload()
    assert [e.step for e in events.Scalars("loss")] == SEEN
    assert [e.value for e in events.Scalars("loss")] == pytest.approx([row["loss"] for row in rows])
    for kind in ("samples", "trajectories"):
        assert [e.step for e in events.Images(kind)] == SEEN
        last = Image.open(io.BytesIO(events.Images(kind)[-1].encoded_image_string))
        assert last.tobytes() == stored(folder, kind, SEEN[-1]).tobytes()
    settings = events.Tensors("settings/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "| model.model_channels | 16 |" in settings


def leveldb_log(data: bytes) -> Iterator[bytes]:
    """Yield the records of a log in LevelDB's format, without comparing checksums.

    Source: LevelDB, doc/log_format.md. W&B's header shortens the first block.
    """
    block, place, record = 32768, 0, b""
    while place < len(data):
        left = block - (place + WANDB_HEADER) % block
        if left < 7:  # too short for a header: zeros
            place += left
            continue
        _, size, kind = struct.unpack_from("<IHB", data, place)
        record += data[place + 7 : place + 7 + size]
        place += 7 + size
        if kind in (1, 4):  # a whole record, or the last part of one
            yield record
            record = b""


def test_weights_and_biases_offline(shared_storage: Path, dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it would upload is in its offline file."""
    pytest.importorskip("wandb")
    from wandb.proto.wandb_internal_pb2 import Record

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    folder, rows = tracked(shared_storage, dataset, "wandb", project="pets", group="baselines", tags=["first try"])
    (file,) = Path(folder).glob("wandb/offline-run-*/run-*.wandb")

    def finished() -> list[Any]:
        """Return all records once the last one is there: W&B's service writes the file after `finish` has returned."""
        records = [Record.FromString(data) for data in leveldb_log(file.read_bytes()[WANDB_HEADER:])]
        return records if records and records[-1].WhichOneof("record_type") == "exit" else []

    records = wait_for(finished)
    (run,) = (r.run for r in records if r.WhichOneof("record_type") == "run")
    assert (run.project, run.run_group, list(run.tags)) == ("pets", "baselines", ["first try"])
    config = {item.key: json.loads(item.value_json) for item in run.config.update}
    assert config["model.model_channels"] == 16
    history = [r.history for r in records if r.WhichOneof("record_type") == "history"]
    logged = [{"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in h.item} for h in history]
    assert [row["loss"] for row in logged if "loss" in row] == pytest.approx([row["loss"] for row in rows])
    for kind in ("samples", "trajectories"):
        pictures = [row for row in logged if kind in row or f"{kind}/path" in row]
        assert [row["images_seen"] for row in pictures] == SEEN
        assert len(list(file.parent.glob(f"files/media/images/{kind}_*.png"))) == len(SEEN)


@pytest.mark.slow
def test_mlflow_in_a_local_store(
    shared_storage: Path, dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A database takes MLflow most of a minute to create."""
    mlflow = pytest.importorskip("mlflow")
    address = f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
    folder, rows = tracked(shared_storage, dataset, "mlflow", project="pets", group="baselines", tags=["first"])
    client = mlflow.MlflowClient(address)
    (run,) = client.search_runs([client.get_experiment_by_name("pets").experiment_id])
    assert run.data.params["model.model_channels"] == "16"
    assert (run.data.tags["group"], run.data.tags["first"]) == ("baselines", "true")
    losses = client.get_metric_history(run.info.run_id, "loss")
    assert [m.step for m in losses] == SEEN
    assert [m.value for m in losses] == pytest.approx([row["loss"] for row in rows])
    for kind in ("samples", "trajectories"):
        files = [tmp_path / "mlruns" / run.info.run_id / "artifacts" / kind / f"images-{i:09d}.png" for i in SEEN]
        assert Image.open(files[-1]).tobytes() == stored(folder, kind, SEEN[-1]).tobytes()


def test_mlflow_without_a_place_is_refused(
    shared_storage: Path, dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    if importlib.util.find_spec("mlflow") is None:
        pytest.skip("mlflow is not installed")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    e = experiment(shared_storage, name="nowhere", train={"trackers": ["mlflow"]})
    with pytest.raises(UserError, match="MLFLOW_TRACKING_URI"):
        make_trackers(TrackedRun(e, e.run_folder(dataset.content_hash), "0" * 16, 0))


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_a_tracker_that_is_not_installed_is_named(shared_storage: Path, name: str) -> None:
    if importlib.util.find_spec(name) is not None:
        pytest.skip(f"{name} is installed")
    e = experiment(shared_storage, name="absent", train={"trackers": [name]})
    with pytest.raises(UserError, match=f"pip install {name}"):
        make_trackers(TrackedRun(e, str(shared_storage), "0" * 16, 0))


@pytest.mark.slow
def test_rays_metrics_have_the_runs_values(shared_storage: Path, dataset: Dataset, private_ray: None) -> None:
    """Prometheus, and with it Ray's dashboard, reads them from this address of the node."""
    import ray

    _, rows = tracked(shared_storage, dataset, "tensorboard")
    port = ray.nodes()[0]["MetricsExportPort"]
    end = time.monotonic() + 60
    while True:
        text = urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10).read().decode()
        lines = [line for line in text.splitlines() if line.startswith("ray_diffscale_loss{")]
        if lines or time.monotonic() > end:
            break
        time.sleep(1)
    assert 'run="tracked-tensorboard"' in lines[0], text[:2000]
    assert float(lines[0].rpartition(" ")[2]) == pytest.approx(rows[-1]["loss"])
