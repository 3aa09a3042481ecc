"""Memory of one worker, counted on fake tensors: nothing is allocated, no device is needed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from diffscale.core.text import gigabytes
from diffscale.models.cost import make_fake

if TYPE_CHECKING:
    from diffscale.config.experiment import Experiment
    from diffscale.data import Dataset

CONTEXT = 500e6  # bytes: CUDA context, cuDNN and communication buffers
OVERHEAD = 1.15  # workspaces and fragmentation


@dataclass(frozen=True)
class Estimate:
    """Estimated peak of one worker in bytes, as `--dry-run` and `doctor` print it."""

    state: int  # weights, gradients, moments and averages
    activations: int  # tensors kept for the backward pass
    images: int  # in that pass
    total: int  # with workspaces, fragmentation and what a device's libraries take

    def text(self) -> str:
        """Return the estimate and what it consists of."""
        return (
            f"about {gigabytes(self.total)} for each worker at its peak: {gigabytes(self.state)} of weights, "
            f"gradients, moments and averages, {gigabytes(self.activations)} of activations in passes of "
            f"{self.images:,} images, and overhead"
        )


def estimate(
    experiment: Experiment,
    dataset: Dataset,
    overhead: float = OVERHEAD,
    device: float | None = None,
    holders: int | None = None,
) -> Estimate:
    """Estimate the peak of one worker.

    overhead: factor for workspaces and fragmentation; 1 for what no eager pass can do without
    device: bytes of a GPU, to which `train.micro_batch=auto` fits its passes; without it, and where one image is too
        much, all of a worker's images are one pass
    holders: workers that hold all weights together (`World.holders`); None where the workers of a node are not known,
        which counts all workers for fsdp2 and one for hsdp, the most that a worker can hold
    """
    train = experiment.train
    share = -(-train.global_batch // train.min_workers)
    wanted = None if train.micro_batch == "auto" else train.micro_batch
    if train.micro_batch == "auto" and device is not None:
        wanted = largest_micro_batch(experiment, dataset, device, holders)
    return _estimate(experiment, dataset, min(wanted or share, share), overhead, holders)


def largest_micro_batch(experiment: Experiment, dataset: Dataset, memory: float, holders: int | None = None) -> int:
    """Return the most images of a pass whose estimated peak is at most `memory` bytes; 0 if one image is too much."""
    two, four = (_estimate(experiment, dataset, images, OVERHEAD, holders) for images in (2, 4))
    per_image = (four.activations - two.activations) / 2

    def fits(images: int) -> bool:
        return _total(two.state, two.activations + per_image * (images - 2), OVERHEAD) <= memory

    about = max(int(((memory - CONTEXT) / OVERHEAD - two.state - two.activations) / per_image) + 2, 0)
    return next((images for images in (about + 1, about) if fits(images)), max(about - 1, 0))


def _estimate(experiment: Experiment, dataset: Dataset, images: int, overhead: float, holders: int | None) -> Estimate:
    train = experiment.train
    if holders is None:
        holders = train.min_workers if train.parallel == "fsdp2" else 1
    parameters, activations = count(experiment, dataset, images)
    averages = int(bool(train.ema.halflife_images or train.ema.halflife_fraction)) + len(train.ema.power)
    kept = averages + bool(averages)  # with the weights that they take in
    copies = 4 + kept / (train.min_workers if train.shard_ema and not train.sharded else 1)  # of gradients, moments too
    state = int(4 * parameters * copies / holders)
    return Estimate(state, activations, images, _total(state, activations, overhead))


def _total(state: int, activations: float, overhead: float) -> int:
    return int((state + activations) * overhead + CONTEXT)


def count(experiment: Experiment, dataset: Dataset, images: int) -> tuple[int, int]:
    """Return the number of parameters, and the bytes that one forward pass keeps for its backward pass.

    With train.activation_checkpointing only the inputs of the checkpointed blocks are kept; the block that is
    recomputed comes on top of them and is not counted.

    images: number of images in the pass.
    """
    from diffscale.config.factory import build_model  # import cost

    # "auto" is counted as float32, the larger: it is resolved on the device, which can be in another machine.
    low = {"bf16": torch.bfloat16, "fp16": torch.bfloat16}.get(experiment.train.precision)
    side, channels = dataset.resolution, dataset.channels
    kept: dict[int, int] = {}
    with torch.device("meta"):
        model = build_model(experiment, dataset).train()
    with FakeTensorMode():
        make_fake(model)
        if experiment.train.activation_checkpointing:
            model.set_activation_checkpointing(True)  # type: ignore[operator]
        own = {_identity(p) for p in model.parameters()}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            if _identity(tensor) not in own:
                kept[_identity(tensor)] = tensor.untyped_storage().nbytes()
            return tensor

        label = torch.zeros(images, dtype=torch.int64) if dataset.num_classes else None
        arguments = (torch.zeros(images, channels, side, side), torch.zeros(images), label)
        with (
            torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
            torch.autocast("cpu", low, enabled=low is not None),
        ):
            output = model(*arguments)  # kept until its graph is counted
        parameters = sum(p.numel() for p in model.parameters())
        del output
    return parameters, sum(kept.values())


def _identity(tensor: torch.Tensor | nn.Parameter) -> int:
    return tensor.untyped_storage()._cdata
