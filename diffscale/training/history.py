"""The training history: metrics.jsonl in the run's folder, and the trackers that the settings name."""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from diffscale.core import storage
from diffscale.core.errors import UserError
from diffscale.core.text import nearest

log = logging.getLogger(__name__)


class Tracker(Protocol):
    def log(self, images_seen: int, values: dict[str, float]) -> None: ...
    def close(self) -> None: ...


class History:
    """One JSON object per line and log interval, in the order of images seen.

    A resumed run drops the lines after the checkpoint that it goes on from, so that no interval is there twice. On a
    store that cannot append, the lines are kept in memory and the file is written again at each `flush`, of which
    there is one before each checkpoint, from its thread.
    """

    def __init__(self, run_folder: str, images_seen: int) -> None:
        self.uri = storage.join(run_folder, "metrics.jsonl")
        self.lines = [line for line in read_lines(self.uri) if json.loads(line)["images_seen"] <= images_seen]
        self._local = None if storage.is_remote(self.uri) else Path(self.uri)
        storage.write_bytes(self.uri, _joined(self.lines))

    def append(self, row: dict[str, Any]) -> None:
        line = json.dumps(row)
        if self._local is None:
            self.lines.append(line)
            return
        with open(self._local, "a", encoding="utf-8") as file:
            file.write(line + "\n")

    def flush(self) -> None:
        if self._local is None:
            storage.write_bytes(self.uri, _joined(list(self.lines)))


def read_lines(uri: str) -> list[str]:
    """The whole lines of a history; one that a crash cut off at the end is left out."""
    if not storage.exists(uri):
        return []
    out = []
    for line in storage.read_bytes(uri).decode(errors="replace").splitlines():
        try:
            json.loads(line)["images_seen"]
        except (ValueError, KeyError, TypeError):
            continue
        out.append(line)
    return out


def read_history(run_folder: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in read_lines(storage.join(run_folder, "metrics.jsonl"))]


def _joined(lines: list[str]) -> bytes:
    return "".join(line + "\n" for line in lines).encode()


def make_trackers(
    names: tuple[str, ...],
    run_folder: str,
    run_name: str,
    run_id: str,
    settings: dict[str, Any],
    images_seen: int,
    part: str = "",
) -> list[Tracker]:
    """part: of a second writer, whose log is kept apart from the run's own.

    Raises UserError for a tracker whose package is missing.
    """
    if part:
        run_name, run_id = f"{run_name} {part}", f"{run_id}-{part}"
    makers: dict[str, Callable[..., Tracker]] = {"tensorboard": TensorBoard, "wandb": WandB, "mlflow": MLflow}
    trackers: list[Tracker] = []
    for name in names:
        if name not in makers:
            raise UserError(setting="train.trackers", value=name, expected=nearest(name, makers))
        try:
            trackers.append(makers[name](run_folder, run_name, run_id, settings, images_seen, part))
        except ImportError as error:
            raise UserError(
                setting="train.trackers",
                value=name,
                expected=f"an installed package ({error})",
                fix=f"pip install {name}",
            ) from None
    return trackers


class TensorBoard:
    """Event files under RUN/tensorboard; for a remote store in a temporary folder whose place is logged."""

    def __init__(
        self, run_folder: str, run_name: str, run_id: str, settings: dict[str, Any], images_seen: int, part: str
    ) -> None:
        from torch.utils.tensorboard import SummaryWriter

        place = storage.join(run_folder, "tensorboard", *([part] if part else []))
        self.remote = place if storage.is_remote(place) else None
        self.folder = Path(tempfile.mkdtemp(prefix="diffscale-tb-") if self.remote else place)
        self.writer = SummaryWriter(str(self.folder), purge_step=images_seen + 1, flush_secs=30)

    def log(self, images_seen: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, images_seen)

    def close(self) -> None:
        self.writer.close()
        if self.remote:
            for file in self.folder.iterdir():
                storage.write_bytes(storage.join(self.remote, file.name), file.read_bytes())


class WandB:
    """Through Ray's own integration, which takes the key from the environment."""

    def __init__(
        self, run_folder: str, run_name: str, run_id: str, settings: dict[str, Any], images_seen: int, part: str
    ) -> None:
        import wandb

        self.run = wandb.init(project="diffscale", name=run_name, id=run_id, resume="allow", config=settings)

    def log(self, images_seen: int, values: dict[str, float]) -> None:
        self.run.log({"images_seen": images_seen, **values})

    def close(self) -> None:
        self.run.finish()


class MLflow:
    """To the server that MLFLOW_TRACKING_URI names."""

    def __init__(
        self, run_folder: str, run_name: str, run_id: str, settings: dict[str, Any], images_seen: int, part: str
    ) -> None:
        import mlflow

        self.mlflow = mlflow
        mlflow.set_experiment("diffscale")
        found = mlflow.search_runs(filter_string=f"tags.diffscale_run_id = '{run_id}'", output_format="list")
        known = found[0].info.run_id if found else None
        mlflow.start_run(run_id=known, run_name=None if known else run_name, tags={"diffscale_run_id": run_id})

    def log(self, images_seen: int, values: dict[str, float]) -> None:
        self.mlflow.log_metrics(values, step=images_seen)

    def close(self) -> None:
        self.mlflow.end_run()
