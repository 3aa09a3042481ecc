"""3 × 3 convolutions in float32 on a CPU with a quarter of the multiplications: Winograd's F(4 × 4, 3 × 3).

Processors without bfloat16 instructions train in float32, where direct convolution runs at the rate of matrix products
and nothing but fewer multiplications makes it faster. Each 4 × 4 tile of outputs becomes 36 products instead of 144
(Lavin & Gray 2016, arXiv 1509.09308), at the price of a rounding error about ten times that of a direct sum. So it is
a choice of the run (training/numerics.py measures whether it pays), off in a model as built.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from diffscale.native import integers, library, pointers

_CHUNK = 2**21  # values of transformed input and output held at once: what fits in a core's share of the last cache


class Conv3x3(nn.Conv2d):
    """A 3 × 3 convolution with zero padding; by Winograd's algorithm where `use_winograd` says so and it applies."""

    winograd = False

    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__(channels_in, channels_out, 3, padding=1)
        self._filters: tuple[tuple[int, int], Tensor] | None = None

    def forward(self, x: Tensor) -> Tensor:
        sampling = self.winograd and not torch.is_grad_enabled()
        if sampling and suits(x, self.weight) and not self.weight.is_inference():
            return convolve(x, self._transformed(), self.bias)
        return conv3x3(x, self.weight, self.bias, self.winograd)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_filters": None}

    def _transformed(self) -> Tensor:
        """The transformed filters, kept for as long as the weights are what they were: for sampling."""
        state = (self.weight.data_ptr(), self.weight._version)
        if self._filters is None or self._filters[0] != state:
            self._filters = state, transform_filters(self.weight)
        return self._filters[1]


def use_winograd(model: nn.Module, enabled: bool) -> bool:
    """Set every layer of a model that has the choice. Whether there is any."""
    layers = [module for module in model.modules() if hasattr(module, "winograd")]
    for layer in layers:
        layer.winograd = enabled  # type: ignore[assignment]
    return bool(layers)


def conv3x3(x: Tensor, weight: Tensor, bias: Tensor | None, winograd: bool) -> Tensor:
    """Zero-padded convolution. x (B, C, H, W), weight (K, C, 3, 3), bias (K,) → (B, K, H, W)."""
    if winograd and suits(x, weight):
        return Winograd.apply(x, weight, bias)
    return F.conv2d(x, weight, bias, padding=1)


def suits(x: Tensor, weight: Tensor) -> bool:
    """Whether the kernels take these: float32 on a CPU, channels in eights, a size that tiles of 4 × 4 cover well."""
    height, width = x.shape[2:]
    tiles = -(-height // 4) * -(-width // 4)
    return (
        x.device.type == "cpu"
        and not torch.compiler.is_compiling()
        and x.dtype == weight.dtype == torch.float32
        and not torch.is_autocast_enabled("cpu")
        and x.shape[1] % 8 == 0
        and weight.shape[0] % 8 == 0
        and height * width >= 8 * tiles
        and type(x) is Tensor
        and type(weight) in (Tensor, nn.Parameter)
        and library("models/winograd") is not None
    )


class Winograd(torch.autograd.Function):
    """`conv3x3`: x (B, C, H, W), weight (K, C, 3, 3), bias (K,) or None → (B, K, H, W) with channels-last strides."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        x = x.contiguous(memory_format=torch.channels_last)
        ctx.save_for_backward(x, weight)
        ctx.biased = bias is not None
        return convolve(x, transform_filters(weight), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        dy = dy.contiguous(memory_format=torch.channels_last)
        dx = torch.empty_like(x) if ctx.needs_input_grad[0] else None
        filters = transform_filters(weight) if dx is not None else None
        dfilters = x.new_zeros(36, *weight.shape[:2])
        for part in parts(x, weight):
            dtiles = transform("output_t", dy[part])
            dfilters.baddbmm_(dtiles.transpose(1, 2), transform("input", x[part]))
            if dx is not None and filters is not None:
                run("winograd_input_t", torch.bmm(dtiles, filters), dx[part], size=(*dx[part].shape,))
        dweight = torch.empty_like(weight, memory_format=torch.channels_last)
        run("winograd_filter_t", dfilters, dweight, size=weight.shape[:2])
        return dx, dweight, dy.sum((0, 2, 3)) if ctx.biased else None


def convolve(x: Tensor, filters: Tensor, bias: Tensor | None) -> Tensor:
    """x (B, C, H, W), filters (36, K, C), bias (K,) or None → (B, K, H, W) with channels-last strides."""
    x = x.contiguous(memory_format=torch.channels_last)
    y = torch.empty(x.shape[0], filters.shape[1], *x.shape[2:], memory_format=torch.channels_last)
    for part in parts(x, filters[0]):
        tiles = torch.bmm(transform("input", x[part]), filters.transpose(1, 2))
        run("winograd_output", tiles, bias, y[part], size=(*y[part].shape,))
    return y


def parts(x: Tensor, weight: Tensor) -> list[slice]:
    """The batch in slices whose transformed inputs and outputs stay in the cache."""
    tiles = -(-x.shape[2] // 4) * -(-x.shape[3] // 4)
    step = max(1, _CHUNK // (36 * tiles * (weight.shape[0] + weight.shape[1])))
    return [slice(first, first + step) for first in range(0, x.shape[0], step)]


def transform(kind: str, images: Tensor) -> Tensor:
    """(B, C, H, W), channels last → (36, B·tiles, C)."""
    batch, channels, height, width = images.shape
    tiles = images.new_empty(36, batch * -(-height // 4) * -(-width // 4), channels)
    run(f"winograd_{kind}", images, tiles, size=(*images.shape,))
    return tiles


def transform_filters(weight: Tensor) -> Tensor:
    """(K, C, 3, 3) → (36, K, C)."""
    out = weight.new_empty(36, *weight.shape[:2])
    run("winograd_filter", weight.contiguous(memory_format=torch.channels_last), out, size=weight.shape[:2])
    return out


def run(name: str, *tensors: Tensor | None, size: tuple[int, ...]) -> None:
    """Call a kernel of winograd.cpp; a size of four is (B, C, H, W) and goes there as B, H, W, C."""
    numbers = (size[0], size[2], size[3], size[1]) if len(size) == 4 else size
    getattr(library("models/winograd"), name)(
        *pointers(*tensors), *integers(*numbers), ctypes.c_int(torch.get_num_threads())
    )
