"""3 × 3 convolutions in float32 on a CPU with a quarter of the multiplications: Winograd's F(4 × 4, 3 × 3).

Processors without bfloat16 instructions train in float32, where direct convolution runs at the rate of matrix products
and nothing but fewer multiplications makes it faster. Each 4 × 4 tile of outputs becomes 36 products instead of 144
(Lavin & Gray 2016, arXiv 1509.09308), at the price of a rounding error about ten times that of a direct sum. So it is
a choice of the run (training/numerics.py measures whether it pays), off in a model as built.
"""

from __future__ import annotations

import ctypes
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from diffscale.native import integers, library, pointers


class Conv3x3(nn.Conv2d):
    """A 3 × 3 convolution with zero padding; by Winograd's algorithm where `use_winograd` says so and it applies."""

    winograd = False

    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__(channels_in, channels_out, 3, padding=1)
        self._filters: tuple[tuple[int, int], Filters] | None = None

    def forward(self, x: Tensor, shift: Tensor | None = None, residual: Tensor | None = None) -> Tensor:
        """x (B, C, H, W) → (B, K, H, W), plus shift (B, K) and residual (B, K, H, W) where they are given."""
        sampling = self.winograd and not torch.is_grad_enabled()
        if sampling and suits(x, self.weight) and not self.weight.is_inference():
            return convolve(x, self._transformed(), shift_of(x, self.bias, shift), residual)
        return conv3x3(x, self.weight, self.bias, self.winograd, shift, residual)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_filters": None}

    def _transformed(self) -> Filters:
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


def conv3x3(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    winograd: bool,
    shift: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """Zero-padded convolution, plus what is given of bias (K,), shift (B, K) and residual (B, K, H, W).

    x (B, C, H, W), weight (K, C, 3, 3) → (B, K, H, W). Winograd's adds all of them while it writes its outputs.
    """
    if winograd and suits(x, weight):
        return Winograd.apply(x, weight, shift_of(x, bias, shift), residual)
    y = F.conv2d(x, weight, bias, padding=1)
    y = y if shift is None else y + shift[:, :, None, None].to(y.dtype)
    return y if residual is None else residual + y


def shift_of(x: Tensor, bias: Tensor | None, shift: Tensor | None) -> Tensor | None:
    """The sum of bias (K,) and shift (B, K), either or both None, as (B, K)."""
    if bias is None or shift is None:
        return shift if bias is None else bias.expand(len(x), -1)
    return bias + shift


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
    """x (B, C, H, W), weight (K, C, 3, 3), shift (B, K) or None, residual (B, K, H, W) or None → (B, K, H, W) with
    channels-last strides."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, shift: Tensor | None, residual: Tensor | None) -> Tensor:
        x = x.contiguous(memory_format=torch.channels_last)
        ctx.save_for_backward(x, weight)
        return convolve(x, transform_filters(weight), shift, residual)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        dy = dy.contiguous(memory_format=torch.channels_last)
        dx = convolve(dy, transform_filters(weight, back=True)) if ctx.needs_input_grad[0] else None
        dweight, dshift = torch.empty_like(weight, memory_format=torch.channels_last), dy.new_empty(dy.shape[:2])
        run("winograd_weight_gradient", (x, dy, dweight, dshift), image_sizes(x, len(weight)))
        return dx, dweight, dshift if ctx.needs_input_grad[2] else None, dy if ctx.needs_input_grad[3] else None


class Filters(NamedTuple):
    """Transformed filters for a convolution to `channels_out` channels, as winograd.cpp arranges them."""

    data: Tensor
    channels_out: int


def transform_filters(weight: Tensor, back: bool = False) -> Filters:
    """Of weight (K, C, 3, 3): for its convolution, or for the one that takes dy (B, K, H, W) back to (B, C, H, W)."""
    weight = weight.contiguous(memory_format=torch.channels_last)
    out = weight.new_empty(36 * (weight.shape[0] * weight.shape[1] + 16))  # planes are 16 values apart
    run("winograd_filters_back" if back else "winograd_filters", (weight, out), weight.shape[:2])
    return Filters(out, weight.shape[1 if back else 0])


def convolve(x: Tensor, filters: Filters, shift: Tensor | None = None, residual: Tensor | None = None) -> Tensor:
    """x (B, C, H, W), shift (B, K), residual (B, K, H, W) → (B, K, H, W) with channels-last strides."""
    x = x.contiguous(memory_format=torch.channels_last)
    y = torch.empty(x.shape[0], filters.channels_out, *x.shape[2:], memory_format=torch.channels_last)
    shift = None if shift is None else shift.contiguous()
    residual = None if residual is None else residual.contiguous(memory_format=torch.channels_last)
    run("winograd_convolve", (x, filters.data, shift, residual, y), image_sizes(x, filters.channels_out))
    return y


def image_sizes(x: Tensor, channels_out: int) -> tuple[int, ...]:
    """B, H, W, C, K, as the kernels take them."""
    b, c, h, w = x.shape
    return b, h, w, c, channels_out


def run(name: str, tensors: tuple[Tensor | None, ...], sizes: tuple[int, ...]) -> None:
    """Call a kernel of winograd.cpp."""
    getattr(library("models/winograd"), name)(
        *pointers(*tensors), *integers(*sizes), ctypes.c_int(torch.get_num_threads())
    )
