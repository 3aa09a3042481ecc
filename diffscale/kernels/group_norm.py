"""Group normalisation, scale and shift, and SiLU as one operation.

On a CPU torch's group norm is several times slower on channels-last images than on contiguous ones, and convolutions
are up to twice as slow on contiguous ones, so a UNet loses either way. group_norm.cpp does all three in one pass over
channels-last images; other images, and other devices, use torch's operations.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from diffscale.kernels.compile import available, integers, library, pointers

KERNEL = "group_norm"


def norm_act(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    eps: float,
    *,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    silu: bool = True,
) -> Tensor:
    """Return silu(group_norm(x)·(1 + scale) + shift) in the precision of x.

    x: (B, C, H, W)
    weight, bias: (C,)
    scale, shift: (B, C), or None for neither
    silu: False leaves out the SiLU
    """
    if _suits_kernel(x):
        gamma, beta = weight[None].expand(len(x), -1), bias[None].expand(len(x), -1)
        if scale is not None and shift is not None:
            gamma, beta = gamma * (1 + scale.float()), torch.addcmul(shift.float(), beta, 1 + scale.float())
        inputs = x, gamma.float().contiguous(), beta.float().contiguous(), groups, eps, silu
        return _compiled(*inputs)[0] if torch.compiler.is_compiling() else _NormAct.apply(*inputs)
    y = F.group_norm(x, groups, weight.to(x.dtype), bias.to(x.dtype), eps)
    if scale is not None and shift is not None:
        scale, shift = scale.to(x.dtype)[:, :, None, None], shift.to(x.dtype)[:, :, None, None]
        y = torch.addcmul(shift, y, 1 + scale)
    return F.silu(y) if silu else y


def _suits_kernel(x: Tensor) -> bool:
    return (
        x.device.type == "cpu"
        and x.dtype in (torch.bfloat16, torch.float32)
        and x.dim() == 4
        and x.shape[1] > 1
        and x.is_contiguous(memory_format=torch.channels_last)
        and type(x) is Tensor
        and available(KERNEL)
    )


def _forward(
    x: Tensor, gamma: Tensor, beta: Tensor, groups: int, eps: float, silu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The result, and the mean and the reciprocal deviation of each group. gamma and beta (B, C) float32."""
    y = torch.empty_like(x)
    mean, rstd = (x.new_empty(x.shape[0], groups, dtype=torch.float32) for _ in range(2))
    run("norm_act_forward", (x, y, mean, rstd, gamma, beta), groups, ctypes.c_float(eps), silu=silu)
    return y, mean, rstd


def _backward(
    dy: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, gamma: Tensor, beta: Tensor, groups: int, silu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, gamma and beta."""
    dx, dgamma, dbeta = torch.empty_like(x), torch.empty_like(gamma), torch.empty_like(beta)
    run("norm_act_backward", (x, dy, mean, rstd, gamma, beta, dx, dgamma, dbeta), groups, silu=silu)
    return dx, dgamma, dbeta


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, gamma, beta, ctx.groups, _, ctx.silu = inputs
    ctx.save_for_backward(x, *output[1:], gamma, beta)


def _gradients(ctx: Any, dy: Tensor, backward: Callable[..., tuple[Tensor, ...]]) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors  # read once: activation checkpointing refuses a second reading
    dy = dy.to(saved[0].dtype).contiguous(memory_format=torch.channels_last)
    return *backward(dy, *saved, ctx.groups, ctx.silu), None, None, None


class _NormAct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        output = _forward(*inputs)
        _keep(ctx, inputs, output)
        return output[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        return _gradients(ctx, dy, _backward)


# The same for torch.compile (see winograd.py).
_compiled = torch.library.custom_op("diffscale::norm_act", _forward, mutates_args=())
_compiled_backward = torch.library.custom_op("diffscale::norm_act_backward", _backward, mutates_args=())
_compiled.register_autograd(lambda ctx, dy, *_: _gradients(ctx, dy, _compiled_backward), setup_context=_keep)


@_compiled.register_fake
def _(x: Tensor, gamma: Tensor, beta: Tensor, groups: int, eps: float, silu: bool) -> tuple[Tensor, ...]:
    return torch.empty_like(x), *(x.new_empty(x.shape[0], groups, dtype=torch.float32) for _ in range(2))


@_compiled_backward.register_fake
def _(dy: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, gamma: Tensor, beta: Tensor, *_: Any) -> tuple[Tensor, ...]:
    return torch.empty_like(x), torch.empty_like(gamma), torch.empty_like(beta)


def run(name: str, tensors: tuple[Tensor, ...], groups: int, *eps: ctypes.c_float, silu: bool) -> None:
    """Call a kernel of group_norm.cpp; the first of the tensors is the images (B, C, H, W)."""
    images = tensors[0]
    b, c, h, w = images.shape
    flags = (int(silu), int(images.dtype == torch.bfloat16), torch.get_num_threads())
    sizes = integers(b, h * w, c, groups)
    getattr(library(KERNEL), name)(*pointers(*tensors), *sizes, *eps, *(ctypes.c_int(flag) for flag in flags))
