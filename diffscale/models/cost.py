"""What a network costs: parameters, multiply-adds and FLOPs of one image.

PyTorch's FlopCounterMode counts the real model, neither compiled nor checkpointed, on the meta device with the
mathematical attention: on a CPU's fused attention the counter sees 3.5 times the forward pass. So the counts are the
same on every device and for every setting that leaves the network unchanged.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, flop_registry


class Cost(NamedTuple):
    """Cost of one image. FLOPs are twice the multiply-adds."""

    parameters: int
    """Trainable parameters."""
    forward_macs: float
    """Multiply-adds of one forward pass."""
    flops_per_image: float
    """FLOPs of one training step: forward, backward, and the extra pass of a model that carries a state."""


def _convolution_backward(*arguments: Any, out_shape: Any, **_: Any) -> int:
    """Count the backward pass of a convolution; torch 2.15 counts a weight's gradient once for each of its groups."""
    count = flop_registry[torch.ops.aten.convolution_backward]
    *shared, groups, (of_input, of_weight, _) = arguments
    backward_of_input = count(*shared, groups, (of_input, False, False), out_val=out_shape)
    return backward_of_input + count(*shared, groups, (False, of_weight, False), out_val=out_shape) // groups


CORRECTED = {torch.ops.aten.convolution_backward: _convolution_backward}


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
        with FlopCounterMode(display=False, custom_mapping=CORRECTED) as counter, torch.no_grad():
            model(x, logsnr, label)
        forward = counter.get_total_flops()
        with FlopCounterMode(display=False, custom_mapping=CORRECTED) as counter:
            prediction, _ = model(x, logsnr, label)
            prediction.sum().backward()
        training = counter.get_total_flops()
    if getattr(model, "carries_state", False):
        training += forward
    parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return Cost(parameters, forward / 2, float(training))


def peak_bytes(build: Callable[[], nn.Module], resolution: int, channels: int, num_classes: int) -> int:
    """Return the bytes of tensors that a pass without gradients holds at most at a time, for one image in float32.

    Weights are not counted. Fake tensors take the place of real ones, so nothing is allocated or computed.

    build: makes the model
    resolution: side of an image in pixels
    channels: channels of an image
    num_classes: number of classes, 0 for a model without labels
    """
    with torch.device("meta"):
        model = build().eval()
    with FakeTensorMode(), torch.no_grad():
        make_fake(model)
        x, logsnr = torch.empty(1, channels, resolution, resolution), torch.empty(1)
        label = torch.zeros(1, dtype=torch.int64) if num_classes else None
        with _LiveBytes() as live:
            model(x, logsnr, label)
    return live.most


def make_fake(model: nn.Module) -> None:
    """Replace a model's parameters and buffers by fake CPU tensors, on which autocast acts like on real ones.

    Call it within a FakeTensorMode. The model can be one of the meta device.
    """
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None:
                fake = torch.empty(parameter.shape, dtype=parameter.dtype)
                module._parameters[name] = nn.Parameter(fake, requires_grad=parameter.requires_grad)
        for name, buffer in list(module._buffers.items()):
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)


class _LiveBytes(TorchDispatchMode):
    """Adds up the storages that operations make, and takes off those that are freed."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {self._storage(t) for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                key = self._storage(tensor)
                if key not in given | self._known:
                    self._known.add(key)
                    size = tensor.untyped_storage().nbytes()
                    self.now += size
                    weakref.finalize(tensor.untyped_storage(), self._free, key, size)
        self.most = max(self.most, self.now)
        return out

    def _free(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size

    @staticmethod
    def _storage(tensor: torch.Tensor) -> int:
        return tensor.untyped_storage()._cdata
