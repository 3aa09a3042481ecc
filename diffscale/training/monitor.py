"""What rank 0 tells of a run: one history row per interval, trackers, and progress to the command that started it."""

from __future__ import annotations

import math
import resource
import time
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from diffscale.core.device import matmul_rate, mfu, money
from diffscale.records.store import Record
from diffscale.training.history import History, Tracker
from diffscale.training.learner import QUARTILES, Step
from diffscale.training.parallel import World

PROGRESS_SECONDS = 0.5
PROGRESS, PHASE, EVALUATED = "progress", "phase", "evaluated"


class Listener(Protocol):
    def put(self, topic: str, message: dict[str, Any]) -> None: ...


@dataclass
class Interval:
    """Sums over the steps since the last row of the history. Steps that updated nothing count as time alone.

    A checkpoint keeps them, so that the first row after a resume averages what the calm run's row does.
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
        return total / self.steps if self.steps else math.nan


class Monitor:
    """Sums steps up to intervals. `rate`: the device's measured matmul FLOP/s. interval: the one that a checkpoint
    has begun."""

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
        self.history, self.trackers, self.listener, self.world = history, trackers, listener, world
        self.flops_per_image, self.price, self.log_images, self.end = flops_per_image, price, log_images, end
        self.rate = matmul_rate(world.device, precision)
        self._told = 0.0
        self.interval = interval or Interval()

    def step(
        self, step: Step, images: int, seconds: float, stalled: float, device_seconds: float, skipped: int
    ) -> None:
        """After each step; `stalled` of its `seconds` were spent waiting for data."""
        self.interval.add(step, images, seconds, stalled)
        if step.images_seen % self.log_images < images:
            self._log(step, device_seconds, skipped)
        elif time.monotonic() - self._told >= PROGRESS_SECONDS:
            self.tell(step.images_seen, step.loss, self.interval.speed)

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
            if count:  # quartiles of t, of which the first is the cleanest: the highest logsnr
                values[f"loss_logsnr_q{QUARTILES - q}"] = total / count
        if (cost := money(device_seconds, self.price)) is not None:
            values["cost"] = cost
        values = {k: v for k, v in values.items() if math.isfinite(v)}
        self.history.append({"images_seen": last.images_seen, "time": round(time.time(), 3), **values})
        for tracker in self.trackers:
            tracker.log(last.images_seen, values)
        self.tell(last.images_seen, values.get("loss"), speed, values["mfu"])
        self.interval = Interval()

    def tell(self, images_seen: int, loss: float | None, speed: float, use: float | None = None) -> None:
        """Progress for the command's display."""
        self._told = time.monotonic()
        if self.listener is not None:
            loss = loss if loss is not None and math.isfinite(loss) else None
            self.listener.put(
                PROGRESS,
                {"images_seen": images_seen, "end": self.end, "loss": loss, "images_per_second": speed, "mfu": use},
            )

    def evaluated(self, images_seen: int, records: list[Record]) -> None:
        """Values of an evaluation, to the trackers; the records themselves are files of their own."""
        values = summary(records)
        for tracker in self.trackers:
            tracker.log(images_seen, values)
        self.history.flush()
        if self.listener is not None:
            self.listener.put(EVALUATED, {"images_seen": images_seen, **values})

    def close(self) -> None:
        self.history.flush()
        for tracker in self.trackers:
            tracker.close()


def summary(records: list[Record]) -> dict[str, float]:
    """An evaluation's values by metric, with the validation loss, as far as they are finite."""
    values = {record.metric: record.value for record in records}
    if records and records[0].val_loss is not None:
        values["val_loss"] = records[0].val_loss
    return {name: value for name, value in values.items() if math.isfinite(value)}


def memory_bytes(device: torch.device) -> float:
    """The most that this process has used: of the GPU's memory, or resident in the machine's."""
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0
