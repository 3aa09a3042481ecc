"""What crosses between the command and its workers: the specification of a launch and its outcome.

Ray Train's controller handles both as plain JSON, so this module does without torch and ray.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from diffscale.config.experiment import Experiment

if TYPE_CHECKING:
    from diffscale.models.cost import Cost

Reason = Literal[
    "finished", "early", "signal", "wall", "nonfinite", "data", "storage", "evaluation", "failed", "refused"
]

TASK_GPU = 0.01  # GPUs of an evaluation task whose Ray actors have the rest; one of them shares the task's GPU


@dataclass(frozen=True)
class RunSpec:
    """One launch of a run, as its workers receive it."""

    experiment: Experiment
    run_folder: str
    cost: Cost
    launch: str  # identifier of the launch, and of its Messages
    gpu: bool  # whether the workers train on GPUs
    stop_with: str | None = None  # launch of other Messages whose STOP stops this run too
    evaluate_async: bool = False  # whether a separate task evaluates
    content_hash: str | None = None  # of the dataset that the command has found

    def to_json(self) -> dict[str, Any]:
        """Return the specification as plain JSON values."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return fields | {"experiment": self.experiment.model_dump_json(), "cost": list(self.cost)}

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> RunSpec:
        """Return the specification that `to_json` wrote."""
        from diffscale.models.cost import Cost  # import cost

        experiment = Experiment.model_validate_json(fields["experiment"])
        return cls(**fields | {"experiment": experiment, "cost": Cost(*fields["cost"])})


@dataclass(frozen=True)
class Outcome:
    """How a launch ended."""

    reason: Reason
    """finished: the budget is used. early: `should_stop` ended the run. signal, wall: stopped by SIGTERM, Ctrl-C or
    train.wall_seconds, to be resumed. nonfinite: losses, gradients or weights were not finite. data: a shard is
    damaged. storage: a place could not be written. evaluation: trained to the end, but an evaluation failed. failed:
    the same error came twice at the same position, or workers were lost too often. refused: a setting is wrong."""
    message: str = ""
    images_seen: int = 0
    device_seconds: float = 0.0
    checkpoint_images: int = 0  # images seen at the last checkpoint
    error: dict[str, Any] | None = None  # fields of the UserError of a refused setting or a damaged shard

    def to_json(self) -> dict[str, Any]:
        """Return the outcome as plain JSON values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> Outcome:
        """Return the outcome that `to_json` wrote."""
        return cls(**fields)
