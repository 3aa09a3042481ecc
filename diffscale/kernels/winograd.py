"""3 × 3 convolutions on a CPU with fewer multiplications: Winograd's algorithm (Lavin & Gray 2016, arXiv 1509.09308).

Direct convolution runs at the rate of matrix products there, and nothing but fewer multiplications makes it faster.

In float32, F(4 × 4, 3 × 3): each 4 × 4 tile of outputs is 36 products instead of 144, at the price of a rounding error
about ten times that of a direct sum. In bfloat16, on processors that multiply it, F(2 × 2, 3 × 3): 16 products instead
of 36, and an error about twice that of direct convolution of bfloat16; larger tiles would amplify its rounding tenfold.
Filters are transformed in float32, before they are rounded.

So a run chooses it (training/numerics.py), and a model does not use it before models/accelerate.py installs it.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from diffscale.kernels.compile import available, integers, library, pointers


@dataclass(frozen=True)
class Kernels:
    """The C++ functions for images of one precision; the filters are always float32."""

    name: str  # of the source
    dtype: torch.dtype  # of the images
    lanes: int  # channels must be a multiple of it
    tile: int  # side of a tile of outputs
    filled: float  # share of the tiles' pixels that images must fill
    apart: int  # values between the planes of transformed filters

    @property
    def available(self) -> bool:
        """Whether this machine can compile and run them."""
        return available(self.name)

    def run(self, name: str, tensors: tuple[Tensor | None, ...], sizes: tuple[int, ...]) -> None:
        threads = ctypes.c_int(torch.get_num_threads())
        getattr(library(self.name), f"winograd_{name}")(*pointers(*tensors), *integers(*sizes), threads)

    def cover(self, height: int, width: int) -> bool:
        """Return whether tiles cover images of height × width pixels well."""
        tiles = -(-height // self.tile) * -(-width // self.tile)
        return height * width >= self.filled * self.tile**2 * tiles


FLOAT32 = Kernels("winograd", torch.float32, lanes=8, tile=4, filled=0.5, apart=16)
BFLOAT16 = Kernels("winograd_bf16", torch.bfloat16, lanes=16, tile=2, filled=1.0, apart=512)


def conv3x3(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    shift: Tensor | None = None,
    residual: Tensor | None = None,
    kept: Callable[[Kernels], Filters] | None = None,
) -> Tensor:
    """Zero-padded 3 × 3 convolution by Winograd's algorithm; by torch's if `suitable` finds no kernels.

    x (B, C, H, W), weight (K, C, 3, 3), bias (K,), shift (B, K) and residual (B, K, H, W) are added to the result,
    (B, K, H, W). The kernels add all of them while they write their outputs, except a residual in another precision,
    which keeps that precision.
    kept: returns the transformed weight; for calls that need no gradient.
    """
    kernels = suitable(x, weight)
    if kernels is None:
        y = F.conv2d(x, weight, bias, padding=1)
        y = y if shift is None else y + shift[:, :, None, None].to(y.dtype)
        return y if residual is None else residual + y
    after = residual if residual is not None and residual.dtype != kernels.dtype else None
    x, shift, fused = x.to(kernels.dtype), shift_of(x, bias, shift), residual if after is None else None
    if kept is not None:
        y = convolve(x, kept(kernels), shift, fused)
    else:
        apply = _compiled if torch.compiler.is_compiling() else Winograd.apply
        y = apply(x, weight.float(), shift, fused)
    return y if after is None else after + y


def shift_of(x: Tensor, bias: Tensor | None, shift: Tensor | None) -> Tensor | None:
    """Return the sum of bias (K,) and shift (B, K), either or both None, as (B, K) float32; None if both are."""
    if shift is None:
        return None if bias is None else bias.float().expand(len(x), -1)
    return shift.float() if bias is None else bias.float() + shift.float()


def suitable(x: Tensor, weight: Tensor) -> Kernels | None:
    """The kernels that take these: on a CPU, in the precision that torch would compute in, channels in whole lanes, a
    size that tiles cover well. None: torch's own convolution has to do it."""
    autocast = torch.is_autocast_enabled("cpu")
    dtype = torch.get_autocast_dtype("cpu") if autocast else x.dtype
    kernels = BFLOAT16 if dtype == torch.bfloat16 else FLOAT32
    taken = (torch.float32, dtype) if autocast else (torch.float32,)
    fits = (
        x.device.type == "cpu"
        and dtype == kernels.dtype
        and x.dtype in taken
        and weight.dtype in taken
        and x.shape[1] % kernels.lanes == 0
        and weight.shape[0] % kernels.lanes == 0
        and kernels.cover(*x.shape[2:])
        and type(x) is Tensor
        and type(weight) in (Tensor, nn.Parameter)
        and kernels.available
    )
    return kernels if fits else None


def _forward(x: Tensor, weight: Tensor, shift: Tensor | None, residual: Tensor | None) -> Tensor:
    return convolve(x, transform_filters(weight, kernels_of(x)), shift, residual)


def _backward(dy: Tensor, x: Tensor, weight: Tensor, of_x: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x (empty where it is not wanted), weight (K, C, 3, 3) and shift (B, K)."""
    kernels = kernels_of(x)
    x, dy = (t.contiguous(memory_format=torch.channels_last) for t in (x, dy))
    dx = convolve(dy, transform_filters(weight, kernels, back=True)) if of_x else x.new_empty(0)
    dweight = torch.empty_like(weight, memory_format=torch.channels_last)
    dshift = dy.new_empty(dy.shape[:2], dtype=torch.float32)
    kernels.run("weight_gradient", (x, dy, dweight, dshift), image_sizes(x, len(weight)))
    return dx, dweight, dshift


def _keep(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor | None, Tensor | None], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:2])


def _gradients(ctx: Any, dy: Tensor, backward: Callable[..., tuple[Tensor, ...]]) -> tuple[Tensor | None, ...]:
    needed = ctx.needs_input_grad
    dx, dweight, dshift = backward(dy, *ctx.saved_tensors, needed[0])
    return dx if needed[0] else None, dweight, dshift if needed[2] else None, dy if needed[3] else None


class Winograd(torch.autograd.Function):
    """x (B, C, H, W), weight (K, C, 3, 3), shift (B, K) or None, residual (B, K, H, W) or None → (B, K, H, W) with
    channels-last strides. x and residual float32 or bfloat16, like the result; weight and shift float32."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        y = _forward(*inputs)
        _keep(ctx, inputs, y)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        return _gradients(ctx, dy, _backward)


# The same for torch.compile, slower when called directly. torch keeps compiled graphs on disk by the names of their
# operations: other arguments need another name.
_compiled = torch.library.custom_op("diffscale::winograd", _forward, mutates_args=())
_compiled_backward = torch.library.custom_op("diffscale::winograd_backward", _backward, mutates_args=())
_compiled.register_autograd(lambda ctx, dy: _gradients(ctx, dy, _compiled_backward), setup_context=_keep)


@_compiled.register_fake
def _(x: Tensor, weight: Tensor, shift: Tensor | None, residual: Tensor | None) -> Tensor:
    return channels_last_like(x, len(weight))


@_compiled_backward.register_fake
def _(dy: Tensor, x: Tensor, weight: Tensor, of_x: bool) -> tuple[Tensor, Tensor, Tensor]:
    dweight = torch.empty_like(weight, memory_format=torch.channels_last)
    dx = channels_last_like(x, x.shape[1]) if of_x else x.new_empty(0)
    return dx, dweight, dy.new_empty(dy.shape[:2], dtype=torch.float32)


class Filters(NamedTuple):
    """Transformed filters for a convolution to `channels_out` channels, as the kernels arrange them."""

    data: Tensor
    channels_out: int
    kernels: Kernels


def transform_filters(weight: Tensor, kernels: Kernels, back: bool = False) -> Filters:
    """Transform weight (K, C, 3, 3) for its convolution; with `back`, for the one from dy (B, K, H, W) to dx."""
    weight = weight.float().contiguous(memory_format=torch.channels_last)
    size = (kernels.tile + 2) ** 2 * (weight.shape[0] * weight.shape[1] + kernels.apart)
    out = weight.new_empty(size, dtype=kernels.dtype)
    kernels.run("filters_back" if back else "filters", (weight, out), weight.shape[:2])
    return Filters(out, weight.shape[1 if back else 0], kernels)


def convolve(x: Tensor, filters: Filters, shift: Tensor | None = None, residual: Tensor | None = None) -> Tensor:
    """x (B, C, H, W), shift (B, K), residual (B, K, H, W) → (B, K, H, W) with channels-last strides."""
    x = x.contiguous(memory_format=torch.channels_last)
    y = channels_last_like(x, filters.channels_out)
    shift = None if shift is None else shift.contiguous()
    residual = None if residual is None else residual.contiguous(memory_format=torch.channels_last)
    filters.kernels.run("convolve", (x, filters.data, shift, residual, y), image_sizes(x, filters.channels_out))
    return y


def kernels_of(x: Tensor) -> Kernels:
    return FLOAT32 if x.dtype == torch.float32 else BFLOAT16


def channels_last_like(x: Tensor, channels: int) -> Tensor:
    """Return an empty tensor like x (B, C, H, W) with another number of channels and channels-last strides."""
    shape = (len(x), channels, *x.shape[2:])
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


def image_sizes(x: Tensor, channels_out: int) -> tuple[int, ...]:
    """Return B, H, W, C, K in the order of the kernels' arguments."""
    b, c, h, w = x.shape
    return b, h, w, c, channels_out
