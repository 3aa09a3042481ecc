"""Ray Train's TorchTrainer with fewer processes of Ray's own to start."""

from __future__ import annotations

from typing import Any

from ray.train.torch import TorchTrainer
from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback

from diffscale.distributed import connect as ray_session


class Trainer(TorchTrainer):
    """Without the actor that hands out Ray Data's shards, which a run does not ask for, and on a private cluster
    without the one that frees the resources of a controller that died: there all of it ends with the command.

    Each is a process of 200 MB that imports Ray Data while the workers start.
    """

    def _create_default_callbacks(self) -> list[Any]:
        left_out: tuple[type, ...] = (DatasetsCallback,)
        if ray_session.is_private():
            left_out += (PlacementGroupCleanerCallback,)
        return [c for c in super()._create_default_callbacks() if not isinstance(c, left_out)]  # type: ignore[misc]
