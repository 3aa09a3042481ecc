"""What a network costs: parameters, multiply-adds and FLOPs of one image.

PyTorch's FlopCounterMode counts the real model, neither compiled nor checkpointed, on the meta device with the
mathematical attention: on a CPU's fused attention the counter sees 3.5 times the forward pass. So the counts are the
same on every device and for every setting that leaves the network unchanged.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode


class Cost(NamedTuple):
    """Cost of one image. FLOPs are twice the multiply-adds."""

    parameters: int
    """Trainable parameters."""
    forward_macs: float
    """Multiply-adds of one forward pass."""
    flops_per_image: float
    """FLOPs of one training step: forward, backward, and the extra pass of a model that carries state."""


def count_cost(build: Callable[[], nn.Module], resolution: int, channels: int, num_classes: int) -> Cost:
    """Count the cost of the model that `build` makes, without memory or time for its weights.

    build: makes the model; it is called on the meta device
    resolution: side of an image in pixels
    channels: channels of an image
    num_classes: number of classes, 0 for a model without labels
    """
    with torch.device("meta"):
        model = build()
    model.train()
    if hasattr(model, "set_activation_checkpointing"):
        model.set_activation_checkpointing(False)  # type: ignore[operator]
    x = torch.empty(1, channels, resolution, resolution, device="meta")
    logsnr = torch.empty(1, device="meta")
    label = torch.empty(1, dtype=torch.int64, device="meta") if num_classes else None
    with sdpa_kernel(SDPBackend.MATH):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(x, logsnr, label)
        forward = counter.get_total_flops()
        with FlopCounterMode(display=False) as counter:
            prediction, _ = model(x, logsnr, label)
            prediction.sum().backward()
        training = counter.get_total_flops()
    if getattr(model, "carries_state", False):
        training += forward
    parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return Cost(parameters, forward / 2, float(training))
