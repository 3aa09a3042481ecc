"""Training metrics on rank 0: the history metrics.jsonl, and what trackers and the command get of it."""

from __future__ import annotations

import json
import logging
import math
import resource
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch

from diffscale.core import storage
from diffscale.core.device import matmul_rate, mfu, money
from diffscale.distributed.messages import EVALUATED, PROGRESS
from diffscale.records.schema import Record
from diffscale.training.parallel import World
from diffscale.training.step import QUARTILES, Step
from diffscale.training.trackers import Tracker, kind_of

log = logging.getLogger(__name__)

PROGRESS_SECONDS = 0.5


# ---- the history


class History:
    """The file metrics.jsonl: one JSON object per log interval, in the order of images seen.

    A resumed run drops the lines after the checkpoint that it resumes from, so that no interval is there twice. A store
    that cannot append gets the whole file at each `flush`; the checkpoint's thread flushes before each checkpoint.
    """

    def __init__(self, run_folder: str, images_seen: int) -> None:
        self.uri = storage.join(run_folder, "metrics.jsonl")
        self.lines = [line for line in read_lines(self.uri) if json.loads(line)["images_seen"] <= images_seen]
        self._local = None if storage.is_remote(self.uri) else Path(self.uri)
        storage.write_bytes(self.uri, _joined(self.lines))

    def append(self, row: dict[str, Any]) -> None:
        """Add a row. images_seen is one of its keys."""
        line = json.dumps(row)
        if self._local is None:
            self.lines.append(line)
            return
        with open(self._local, "a", encoding="utf-8") as file:
            file.write(line + "\n")

    def flush(self) -> None:
        """Write the rows to a store that cannot append."""
        if self._local is None:
            storage.write_bytes(self.uri, _joined(list(self.lines)))


def read_lines(uri: str) -> list[str]:
    """Return the complete lines of a history, without a last line that a crash cut off."""
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
    """Return the rows of a run's history."""
    return [json.loads(line) for line in read_lines(storage.join(run_folder, "metrics.jsonl"))]


def _joined(lines: list[str]) -> bytes:
    return "".join(line + "\n" for line in lines).encode()


# ---- one launch's log


class Listener(Protocol):
    """What receives progress: `Messages`, or nothing at all in a test."""

    def put(self, topic: str, message: dict[str, Any]) -> None: ...


@dataclass
class Interval:
    """Sums over the steps since the last row of the history. Skipped steps count as time alone.

    A checkpoint keeps them, so that the first row after a resume is that of an uninterrupted run.
    """

    images: int = 0
    seconds: float = 0.0
    stalled: float = 0.0
    steps: int = 0
    loss: float = 0.0
    grad_norm: float = 0.0
    quartile_sums: list[float] = field(default_factory=lambda: [0.0] * QUARTILES)
    quartile_counts: list[float] = field(default_factory=lambda: [0.0] * QUARTILES)

    def add(self, step: Step, images: int, seconds: float, stalled: float) -> None:
        """Add one step; `stalled` of its `seconds` were spent waiting for data."""
        self.images += images
        self.seconds += seconds
        self.stalled += stalled
        if step.skipped or step.overflow:
            return
        self.steps += 1
        self.loss += step.loss
        self.grad_norm += step.grad_norm
        for q in range(QUARTILES):
            self.quartile_sums[q] += step.quartile_sums[q]
            self.quartile_counts[q] += step.quartile_counts[q]

    @property
    def speed(self) -> float:
        """Images per second."""
        return self.images / max(self.seconds, 1e-9)

    def mean(self, total: float) -> float:
        """Return a sum's mean over the steps that updated the weights."""
        return total / self.steps if self.steps else math.nan


class MetricsLog:
    """Sums steps into intervals and writes one row of the history for each."""

    def __init__(
        self,
        history: History,
        trackers: list[Tracker],
        listener: Listener | None,
        world: World,
        precision: str,
        flops_per_image: float,
        price: float | None,
        log_images: int,
        end: int | None,
        interval: Interval | None = None,
    ) -> None:
        """Measure the device's matmul rate, the denominator of MFU.

        listener: receives progress for the command
        price: of one device-hour; None for no cost in the history
        log_images: images between two rows
        end: images at which the run ends; None if only device-seconds end it
        interval: the unfinished interval of the checkpoint that the run resumes from
        """
        self.history, self.trackers, self.listener, self.world = history, trackers, listener, world
        self.flops_per_image, self.price, self.log_images, self.end = flops_per_image, price, log_images, end
        self.rate = matmul_rate(world.device, precision)
        self._reported = 0.0
        self.interval = interval or Interval()

    def step(
        self, step: Step, images: int, seconds: float, stalled: float, device_seconds: float, skipped: int
    ) -> None:
        """Log one step of `images`; `stalled` of its `seconds` were spent waiting for data."""
        self.interval.add(step, images, seconds, stalled)
        if step.images_seen % self.log_images < images:
            self._log(step, device_seconds, skipped)
        elif time.monotonic() - self._reported >= PROGRESS_SECONDS:
            self.report(step.images_seen, step.loss, self.interval.speed)

    def _log(self, last: Step, device_seconds: float, skipped: int) -> None:
        interval, speed = self.interval, self.interval.speed
        values: dict[str, float] = {
            "loss": interval.mean(interval.loss),
            "grad_norm": interval.mean(interval.grad_norm),
            "lr": last.lr,
            "images_per_second": speed,
            "mfu": mfu(self.flops_per_image, speed, self.world.size, self.rate),
            "data_stall": interval.stalled / max(interval.seconds, 1e-9),
            "memory_bytes": memory_bytes(self.world.device),
            "skipped_steps": skipped,
            "device_seconds": device_seconds,
            "train_flops": self.flops_per_image * last.images_seen,
        }
        for q, (total, count) in enumerate(zip(interval.quartile_sums, interval.quartile_counts, strict=True)):
            if count:  # the first quartile of t is the cleanest: the highest logsnr
                values[f"loss_logsnr_q{QUARTILES - q}"] = total / count
        if (cost := money(device_seconds, self.price)) is not None:
            values["cost"] = cost
        values = {k: v for k, v in values.items() if math.isfinite(v)}
        self.history.append({"images_seen": last.images_seen, "time": round(time.time(), 3), **values})
        for tracker in self.trackers:
            tracker.log(last.images_seen, values)
        self.report(last.images_seen, values.get("loss"), speed, values["mfu"])
        self.interval = Interval()

    def report(self, images_seen: int, loss: float | None, speed: float, use: float | None = None) -> None:
        """Send progress to the command. speed: images per second. use: MFU."""
        self._reported = time.monotonic()
        if self.listener is not None:
            loss = loss if loss is not None and math.isfinite(loss) else None
            self.listener.put(
                PROGRESS,
                {"images_seen": images_seen, "end": self.end, "loss": loss, "images_per_second": speed, "mfu": use},
            )

    def evaluated(self, images_seen: int, records: list[Record]) -> None:
        """Send the values of an evaluation to the trackers and the command; its records are separate files."""
        values = summary(records)
        for tracker in self.trackers:
            tracker.log(images_seen, values)
        self.history.flush()
        if self.listener is not None:
            self.listener.put(EVALUATED, {"images_seen": images_seen, **values})

    def picture(self, images_seen: int, uri: str) -> None:
        """Send a picture of an evaluation to the trackers."""
        for tracker in self.trackers:
            tracker.picture(images_seen, kind_of(uri), storage.read_bytes(uri))

    def close(self) -> None:
        """Flush the history and close the trackers."""
        self.history.flush()
        for tracker in self.trackers:
            tracker.close()


def summary(records: list[Record]) -> dict[str, float]:
    """Return an evaluation's finite values by metric, with the validation loss."""
    values = {record.metric: record.value for record in records}
    if records and records[0].val_loss is not None:
        values["val_loss"] = records[0].val_loss
    return {name: value for name, value in values.items() if math.isfinite(value)}


def memory_bytes(device: torch.device) -> float:
    """Return the peak memory of this process: of the GPU, or resident on the CPU."""
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0
