"""Memory of one worker, counted on fake tensors: nothing is allocated, no device is needed."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

if TYPE_CHECKING:
    from diffscale.config.experiment import Experiment
    from diffscale.data import Dataset

CONTEXT = 500e6  # bytes: CUDA context, cuDNN and communication buffers
OVERHEAD = 1.15  # workspaces and fragmentation


def needed_bytes(experiment: Experiment, dataset: Dataset) -> int:
    """Return the estimated peak of one worker in bytes.

    It consists of weights, gradients, moments, averages, and the tensors kept for the backward pass.
    """
    train = experiment.train
    workers = train.min_workers
    images = min(train.micro_batch or train.global_batch, -(-train.global_batch // workers))
    parameters, activations = count(experiment, dataset, images)
    averages = int(bool(train.ema.halflife_images or train.ema.halflife_fraction)) + len(train.ema.power)
    copies = 4 + averages  # weights, gradients, first and second moment
    state = 4.0 * parameters * copies / (workers if train.parallel == "fsdp2" else 1)
    return int((state + activations) * OVERHEAD + CONTEXT)


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
        _fake(model)
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


def _fake(model: nn.Module) -> None:
    """Replace parameters and buffers by fake CPU tensors, on which autocast acts like on real ones."""
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None:
                fake = torch.empty(parameter.shape, dtype=parameter.dtype)
                module._parameters[name] = nn.Parameter(fake, requires_grad=parameter.requires_grad)
        for name, buffer in list(module._buffers.items()):
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)


def _identity(tensor: torch.Tensor | nn.Parameter) -> int:
    return tensor.untyped_storage()._cdata
