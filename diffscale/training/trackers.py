"""Experiment trackers: the history's numbers, the pictures of each evaluation and the run's settings, as they arrive.

TensorBoard, Weights & Biases and MLflow follow `train.trackers`; Ray's metrics, which its dashboard and Prometheus
read, follow from the run's being on a Ray cluster.
"""

from __future__ import annotations

import io
import json
import os
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from diffscale.config.experiment import Experiment
from diffscale.core import storage
from diffscale.core.errors import UserError

MLFLOW_ADDRESS = "MLFLOW_TRACKING_URI"
SQLITE = "sqlite:///"


class Tracker(Protocol):
    """Receives every row of the history and every picture of a run."""

    def log(self, images_seen: int, values: dict[str, float]) -> None: ...
    def picture(self, images_seen: int, kind: str, png: bytes) -> None: ...
    def close(self) -> None: ...


@dataclass(frozen=True)
class TrackedRun:
    """What trackers are told about a run when it starts or resumes."""

    experiment: Experiment
    folder: str
    run_id: str
    images_seen: int  # that the run resumes from
    part: str = ""  # name of a second writer of the run, whose log is separate; empty for the run itself

    @property
    def name(self) -> str:
        return f"{self.experiment.name} {self.part}".strip()

    @property
    def identity(self) -> str:
        return f"{self.run_id}-{self.part}" if self.part else self.run_id


def make_trackers(run: TrackedRun) -> list[Tracker]:
    """Make the trackers of train.trackers, and Ray's metrics. Raises UserError for a missing package or address."""
    makers: dict[str, Callable[[TrackedRun], Tracker]] = {"tensorboard": TensorBoard, "wandb": WandB, "mlflow": MLflow}
    trackers: list[Tracker] = []
    for name in run.experiment.train.trackers:
        try:
            trackers.append(makers[name](run))
        except ImportError as error:
            raise UserError(
                setting="train.trackers",
                value=name,
                expected="an installed package",
                reason=str(error),
                fix=f"pip install {name}",
            ) from None
    return trackers + ([RayMetrics(run)] if _on_ray() and not run.part else [])


class TensorBoard:
    """Event files under RUN/tensorboard. For a remote store they are written locally and uploaded at the end."""

    def __init__(self, run: TrackedRun) -> None:
        from torch.utils.tensorboard import SummaryWriter  # import cost

        place = storage.join(run.folder, "tensorboard", *([run.part] if run.part else []))
        self.remote = place if storage.is_remote(place) else None
        self.folder = Path(tempfile.mkdtemp(prefix="diffscale-tb-") if self.remote else place)
        self.writer = SummaryWriter(str(self.folder), purge_step=run.images_seen + 1, flush_secs=30)
        rows = [f"| {key} | {json.dumps(value)} |" for key, value in run.experiment.dotted().items()]
        self.writer.add_text("settings", "\n".join(["| setting | value |", "|---|---|", *rows]), run.images_seen)

    def log(self, images_seen: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, images_seen)

    def picture(self, images_seen: int, kind: str, png: bytes) -> None:
        self.writer.add_image(kind, np.asarray(_decoded(png)), images_seen, dataformats="HWC")

    def close(self) -> None:
        self.writer.close()
        if self.remote:
            for file in self.folder.iterdir():
                storage.write_bytes(storage.join(self.remote, file.name), file.read_bytes())


class WandB:
    """A run of Weights & Biases, with the key from the environment; offline files are in the run's folder."""

    def __init__(self, run: TrackedRun) -> None:
        import wandb  # import cost

        self.wandb, settings = wandb, run.experiment.train.tracker
        self.run = wandb.init(
            project=settings.project,
            group=settings.group,
            tags=list(settings.tags),
            name=run.name,
            id=run.identity,
            resume="allow",
            config=run.experiment.dotted(),
            dir=os.environ.get("WANDB_DIR") or (None if storage.is_remote(run.folder) else run.folder),
        )
        self.run.define_metric("*", step_metric="images_seen")

    def log(self, images_seen: int, values: dict[str, float]) -> None:
        self.run.log({"images_seen": images_seen, **values})

    def picture(self, images_seen: int, kind: str, png: bytes) -> None:
        self.run.log({"images_seen": images_seen, kind: self.wandb.Image(_decoded(png))})

    def close(self) -> None:
        self.run.finish()


class MLflow:
    """A run on the MLflow server or local store of MLFLOW_TRACKING_URI. The project is MLflow's experiment."""

    def __init__(self, run: TrackedRun) -> None:
        import mlflow  # import cost

        address = os.environ.get(MLFLOW_ADDRESS, "")
        if not address:
            raise UserError(
                setting=MLFLOW_ADDRESS,
                value=None,
                expected="the address of an MLflow server, or sqlite:////FILE",
                reason="workers have temporary folders, in which MLflow's default would be lost",
            )
        self.mlflow, settings = mlflow, run.experiment.train.tracker
        if address.startswith(SQLITE):  # whose pictures would go to the worker's temporary folder
            place = Path(address.removeprefix(SQLITE)).resolve().parent / "mlruns"
            with suppress(mlflow.exceptions.MlflowException):  # the experiment exists
                mlflow.create_experiment(settings.project, artifact_location=place.as_uri())
        mlflow.set_experiment(settings.project)
        tags = {"diffscale_run_id": run.identity}
        found = mlflow.search_runs(filter_string=f"tags.diffscale_run_id = '{run.identity}'", output_format="list")
        if found:
            mlflow.start_run(run_id=found[0].info.run_id)
        else:
            mlflow.start_run(run_name=run.name, tags=tags)
            mlflow.log_params({key: json.dumps(value) for key, value in run.experiment.dotted().items()})
        group = {"group": settings.group} if settings.group else {}
        mlflow.set_tags(group | dict.fromkeys(settings.tags, "true"))

    def log(self, images_seen: int, values: dict[str, float]) -> None:
        self.mlflow.log_metrics(values, step=images_seen)

    def picture(self, images_seen: int, kind: str, png: bytes) -> None:
        self.mlflow.log_image(_decoded(png), artifact_file=f"{kind}/images-{images_seen:09d}.png")

    def close(self) -> None:
        self.mlflow.end_run()


class RayMetrics:
    """Gauges of Ray, `ray_diffscale_<value>` with the tags `run` and `run_id`: Prometheus and dashboards show them."""

    def __init__(self, run: TrackedRun) -> None:
        self.tags = {"run": run.name, "run_id": run.run_id}
        self.gauges: dict[str, Any] = {}

    def log(self, images_seen: int, values: dict[str, float]) -> None:
        from ray.util.metrics import Gauge  # import cost

        for name, value in {"images_seen": images_seen, **values}.items():
            if name not in self.gauges:
                gauge = Gauge(f"diffscale_{name}", description=f"{name} of a run", tag_keys=tuple(self.tags))
                self.gauges[name] = gauge
            self.gauges[name].set(value, self.tags)

    def picture(self, images_seen: int, kind: str, png: bytes) -> None:
        """Metrics have no pictures."""

    def close(self) -> None:
        """Ray exports the last values until the process ends."""


def kind_of(picture: str) -> str:
    """Return the kind of a run's picture, the name of its folder: samples or trajectories. picture: a URI."""
    return picture.split("/")[-2]


def _decoded(png: bytes) -> Image.Image:
    return Image.open(io.BytesIO(png)).convert("RGB")


def _on_ray() -> bool:
    ray = sys.modules.get("ray")
    return ray is not None and ray.is_initialized()
