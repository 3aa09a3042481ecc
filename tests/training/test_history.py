"""What a run tells of itself: each interval once, in the file and in the trackers."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from diffscale.data import Dataset
from diffscale.errors import UserError
from diffscale.training.history import History, make_trackers, read_history

from .small import BATCH
from .test_sessions import launch, short


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


def test_a_line_that_a_crash_cut_off_is_dropped(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"images_seen": 10}\n{"images_se')
    History(str(tmp_path), 20).append({"images_seen": 20})
    assert [row["images_seen"] for row in read_history(str(tmp_path))] == [10, 20]


def test_tensorboard_has_the_history(shared_storage: Path, dataset: Dataset) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    _, folder = launch(short(shared_storage, "events", train={"trackers": ["tensorboard"]}), dataset)
    events = EventAccumulator(f"{folder}/tensorboard")
    events.Reload()
    rows = read_history(folder)
    assert [e.step for e in events.Scalars("loss")] == [10 * BATCH, 20 * BATCH, 30 * BATCH]
    assert [e.value for e in events.Scalars("loss")] == pytest.approx([row["loss"] for row in rows])


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_a_tracker_that_is_not_installed_is_named(tmp_path: Path, name: str) -> None:
    if importlib.util.find_spec(name) is not None:
        pytest.skip(f"{name} is installed")
    with pytest.raises(UserError, match=f"pip install {name}"):
        make_trackers((name,), str(tmp_path), "run", "0" * 16, {}, 0)
