"""What rank 0 tells of a run: one history row per interval, trackers, and progress to the command that started it."""

from __future__ import annotations

import math
import resource
import time
from typing import Any, Protocol

import torch

from diffscale.compute import matmul_rate, mfu, money
from diffscale.records import Record
from diffscale.training.history import History, Tracker
from diffscale.training.learner import QUARTILES, Step
from diffscale.training.parallel import World

PROGRESS_SECONDS = 0.5
PROGRESS, PHASE, EVALUATED = "progress", "phase", "evaluated"


class Listener(Protocol):
    def put(self, topic: str, message: dict[str, Any]) -> None: ...


class Monitor:
    """Sums steps up to intervals. `rate`: the device's measured matmul FLOP/s."""

    def __init__(
        self, history: History, trackers: list[Tracker], listener: Listener | None, world: World, precision: str,
        flops_per_image: float, price: float | None, log_images: int, end: int | None,
    ) -> None:  # fmt: skip
        self.history, self.trackers, self.listener, self.world = history, trackers, listener, world
        self.flops_per_image, self.price, self.log_images, self.end = flops_per_image, price, log_images, end
        self.rate = matmul_rate(world.device, precision)
        self._told = 0.0
        self._clear()

    def _clear(self) -> None:
        self._steps: list[Step] = []
        self._images, self._seconds, self._stalled = 0, 0.0, 0.0

    def step(
        self, step: Step, images: int, seconds: float, stalled: float, device_seconds: float, skipped: int
    ) -> None:
        """After each step; `stalled` of its `seconds` were spent waiting for data."""
        self._steps.append(step)
        self._images += images
        self._seconds += seconds
        self._stalled += stalled
        if step.images_seen % self.log_images < images:
            self._log(device_seconds, skipped)
        elif time.monotonic() - self._told >= PROGRESS_SECONDS:
            self.tell(step.images_seen, step.loss, self._images / max(self._seconds, 1e-9))

    def _log(self, device_seconds: float, skipped: int) -> None:
        last, speed = self._steps[-1], self._images / max(self._seconds, 1e-9)
        good = [s for s in self._steps if not (s.skipped or s.overflow)]
        values: dict[str, float] = {
            "loss": _mean([s.loss for s in good]),
            "grad_norm": _mean([s.grad_norm for s in good]),
            "lr": last.lr,
            "images_per_second": speed,
            "mfu": mfu(self.flops_per_image, speed, self.world.size, self.rate),
            "data_stall": self._stalled / max(self._seconds, 1e-9),
            "memory_bytes": memory_bytes(self.world.device),
            "skipped_steps": skipped,
            "device_seconds": device_seconds,
            "train_flops": self.flops_per_image * last.images_seen,
        }
        for q in range(QUARTILES):
            count = sum(s.quartile_counts[q] for s in good)
            if count:  # quartiles of t, of which the first is the cleanest: the highest logsnr
                values[f"loss_logsnr_q{QUARTILES - q}"] = sum(s.quartile_sums[q] for s in good) / count
        if (cost := money(device_seconds, self.price)) is not None:
            values["cost"] = cost
        values = {k: v for k, v in values.items() if math.isfinite(v)}
        self.history.append({"images_seen": last.images_seen, "time": round(time.time(), 3), **values})
        for tracker in self.trackers:
            tracker.log(last.images_seen, values)
        self.tell(last.images_seen, values.get("loss"), speed, values["mfu"])
        self._clear()

    def tell(self, images_seen: int, loss: float | None, speed: float, use: float | None = None) -> None:
        """Progress for the command's display."""
        self._told = time.monotonic()
        if self.listener is not None:
            loss = loss if loss is not None and math.isfinite(loss) else None
            self.listener.put(
                PROGRESS,
                {"images_seen": images_seen, "end": self.end, "loss": loss, "images_per_second": speed, "mfu": use},
            )  # fmt: skip

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


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else math.nan
