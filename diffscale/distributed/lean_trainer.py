"""Ray Train's TorchTrainer without two of its helper processes.

Each helper is a process of 200 MB that imports Ray Data while the workers start. Leaving one out needs the classes of
Ray's internal callbacks; `ray.train.torch.TorchTrainer` does the same work, only with a slower start. Remove this
module when Ray Train has a setting for the helpers.
"""

from __future__ import annotations

from typing import Any

from ray.train.torch import TorchTrainer
from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback

from diffscale.distributed.connect import is_private


class LeanTorchTrainer(TorchTrainer):
    """A TorchTrainer for runs that read their data themselves.

    It leaves out the actor that distributes Ray Data's shards. On a private cluster it also leaves out the actor that
    frees the resources of a dead controller, since such a cluster ends with the command.
    """

    def _create_default_callbacks(self) -> list[Any]:
        left_out: tuple[type, ...] = (DatasetsCallback,)
        if is_private():
            left_out += (PlacementGroupCleanerCallback,)
        return [c for c in super()._create_default_callbacks() if not isinstance(c, left_out)]  # type: ignore[misc]
