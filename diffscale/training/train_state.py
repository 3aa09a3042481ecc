"""What a launch adds up over its steps and keeps in its checkpoints, besides the learner's tensors."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from diffscale.training.metrics_log import Interval
from diffscale.training.step import Step


@dataclass
class TrainState:
    """What a launch adds up. Checkpoints hold it in state.json."""

    device_seconds: float = 0.0  # of training alone, summed over the devices
    energy_before: float = 0.0  # joules of earlier launches
    skipped: int = 0  # steps whose loss or gradient was not finite
    skipped_in_row: int = 0
    loss_sum: float = 0.0  # since the last evaluation
    loss_steps: int = 0
    launches: int = 1
    bit_identical: bool = True  # whether an uninterrupted run would have the same weights to the bit
    interval: dict[str, Any] = field(default_factory=dict)  # of the history's unfinished row, at the checkpoint
    values: dict[int, float] = field(default_factory=dict)  # images seen → the first metric's value

    @classmethod
    def resumed(cls, stored: dict[str, Any]) -> TrainState:
        """Return the state of the launch after a checkpoint. stored: its state.json."""
        return cls(
            device_seconds=stored["device_seconds"],
            energy_before=stored["energy_joules"] or 0.0,
            skipped=stored["skipped"],
            skipped_in_row=stored["skipped_in_row"],
            loss_sum=stored["loss_sum"],
            loss_steps=stored["loss_steps"],
            launches=stored.get("launches", 1) + 1,
            bit_identical=stored["bit_identical"],
            interval=stored.get("interval") or {},
            values={int(images): value for images, value in stored["values"].items()},
        )

    def to_json(self, energy: float | None, interval: Interval | None) -> dict[str, Any]:
        """Return the part of state.json that `resumed` reads. energy: joules of all launches, None if unknown."""
        return {
            "device_seconds": self.device_seconds,
            "energy_joules": energy,
            "skipped": self.skipped,
            "launches": self.launches,
            "skipped_in_row": self.skipped_in_row,
            "loss_sum": self.loss_sum,
            "loss_steps": self.loss_steps,
            "interval": asdict(interval) if interval is not None else None,
            "values": {str(images): value for images, value in self.values.items()},
            "bit_identical": self.bit_identical,
        }

    def count(self, step: Step) -> None:
        """Add a step."""
        self.device_seconds = step.clock
        self.skipped += step.skipped
        self.skipped_in_row = self.skipped_in_row + 1 if step.skipped else 0
        if not (step.skipped or step.overflow):
            self.loss_sum, self.loss_steps = self.loss_sum + step.loss, self.loss_steps + 1

    def mean_loss(self) -> float | None:
        """Return the mean loss since the last evaluation."""
        return self.loss_sum / self.loss_steps if self.loss_steps else None


@dataclass
class LastSave:
    """The last checkpoint of this launch, or where the launch began."""

    images_seen: int
    device_seconds: float
    made: bool = False  # whether this launch has saved
