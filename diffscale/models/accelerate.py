"""Faster forward passes, installed after construction: for UNets on a CPU, and for HDiT on a GPU.

The model files state each operation in plain torch. On a CPU three fusions (diffscale/kernels) make UNets about twice
as fast: group norm with scale, shift and SiLU in one pass over channels-last images, convolutions that add embedding
and residual while they write, and Winograd's algorithm for the convolutions themselves. On a GPU torch's own kernels
are fast, except for HDiT's neighbourhoods. `accelerate` changes the class of the modules that have such a forward;
parameters, buffers and state dict stay the same.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffscale.kernels.group_norm import norm_act
from diffscale.kernels.runtime import why_not_compiled
from diffscale.kernels.winograd import (
    FLOAT32,
    Filters,
    Kernels,
    conv3x3,
    convolve,
    shift_of,
    suitable,
    transform_filters,
)
from diffscale.models.edm2 import MPWeight
from diffscale.models.hdit import Grid, GridTables, HDiTBlock
from diffscale.models.layers import GroupNorm, scale_and_shift, without_autocast
from diffscale.models.neighbourhood_attention import Windows, fused_neighbourhood_attention, near_pixels
from diffscale.models.unet import ConvResample, OutputHead, UNet, UNetBlock
from diffscale.models.uvit import ConvBlock, UViT

log = logging.getLogger(__name__)


def accelerate(model: nn.Module, *, winograd: bool) -> nn.Module:
    """Install the fused forwards for a model's device, in place; return the same object.

    winograd: on a CPU, whether 3 × 3 convolutions use Winograd's algorithm (kernels/winograd.py), which rounds
        differently. False takes it back from a model that had it.

    A model on any other device is unchanged. An accelerated model that moves to another kind of device computes there
    with torch's operations.
    """
    kinds = {tensor.device.type for tensor in model.parameters()}
    installed = _FUSED if kinds == {"cpu"} else ()
    if kinds == {"cuda"} and any(isinstance(module, GridTables) for module in model.modules()):
        if reason := why_not_compiled("cuda"):
            log.warning("neighbourhood attention is in plain torch, because torch.compile does not work: %s", reason)
        else:
            installed = _FUSED_ON_GPU
    for module in [*model.modules()]:
        for fused in installed:
            plain = fused.__bases__[0]
            if isinstance(module, plain) and not isinstance(module, fused):
                _mix_in(module, fused)
    if kinds != {"cpu"}:
        return model
    for convolution in winograd_layers(model):
        plain, fast = (MPWeight, WinogradMPWeight) if isinstance(convolution, MPWeight) else (nn.Conv2d, WinogradConv2d)
        convolution.__class__ = fast if winograd else plain
    return model


def accelerate_frozen_convolutions(model: nn.Module) -> None:
    """Let the 3 × 3 convolutions of a frozen network that others wrote use Winograd's algorithm, where this CPU can.

    Only float32 images take that path; Inception's 3 × 3 convolutions then need half the time.
    """
    for module in model.modules():
        if type(module) is nn.Conv2d and _fits_kernels(module) and FLOAT32.available:
            module.__class__ = FrozenConv2d


def winograd_layers(model: nn.Module) -> Iterator[nn.Conv2d | MPWeight]:
    """Yield the convolutions of our backbones that Winograd's algorithm can compute.

    Convolutions of other networks are not among them, nor those whose padding a filter needs (InputPyramid).
    """
    for owner in model.modules():
        if isinstance(owner, MPWeight) and owner.padding:
            yield owner
        elif isinstance(owner, _OWNERS):
            yield from (child for child in owner.children() if isinstance(child, nn.Conv2d) and _is_3x3(child))


class WinogradConv2d(nn.Conv2d):
    """A 3 × 3 convolution by Winograd's algorithm; transformed filters are kept while sampling."""

    _filters: tuple[tuple[Kernels, int, int], Filters] | None = None

    def forward(self, x: Tensor, shift: Tensor | None = None, residual: Tensor | None = None) -> Tensor:
        """x (B, C, H, W) → (B, K, H, W), plus shift (B, K) and residual (B, K, H, W) if given."""
        sampling = not torch.is_grad_enabled() and not self.weight.is_inference()
        return conv3x3(x, self.weight, self.bias, shift, residual, self._transformed if sampling else None)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_filters": None}

    def _transformed(self, kernels: Kernels) -> Filters:
        """The transformed filters; computed again when the weights have changed."""
        state = (kernels, self.weight.data_ptr(), self.weight._version)
        if self._filters is None or self._filters[0] != state:
            self._filters = state, transform_filters(self.weight, kernels)
        return self._filters[1]


class WinogradMPWeight(MPWeight):
    """EDM2's 3 × 3 convolution by Winograd's algorithm."""

    def forward(self, x: Tensor, gain: Tensor | float = 1.0) -> Tensor:
        return conv3x3(x, self.scaled(gain).to(x.dtype), None)


class FrozenConv2d(nn.Conv2d):
    """A 3 × 3 convolution of padding 0 or 1 whose weights never change: Winograd's algorithm on float32 images."""

    _filters: Filters | None = None

    def forward(self, x: Tensor) -> Tensor:
        if suitable(x, self.weight) is not FLOAT32:
            return super().forward(x)
        if self._filters is None:
            self._filters = transform_filters(self.weight, FLOAT32)
        y = convolve(x, self._filters, shift_of(x, self.bias, None))
        return y if self.padding == (1, 1) else y[:, :, 1:-1, 1:-1]


class FusedGroupNorm(GroupNorm):
    """Group norm, scale and shift, and SiLU in one pass over channels-last images."""

    def forward(
        self, x: Tensor, scale: Tensor | None = None, shift: Tensor | None = None, silu: bool = False
    ) -> Tensor:
        """silu(norm(x)·(1 + scale) + shift). x (B, C, H, W), scale and shift (B, C) or None."""
        with without_autocast(x.device):
            return norm_act(x, self.weight, self.bias, self.groups, self.eps, scale=scale, shift=shift, silu=silu)


class FusedUNetBlock(UNetBlock):
    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        s = self.settings
        h, modulation = self.resample(_norm_silu(self.norm1, x)), self.embed(embedding)
        if s.adaptive_scale:
            scale, shift = modulation.chunk(2, dim=1)
            h = _norm_silu(self.norm2, self.conv1(h), scale, shift)
        else:
            h = _norm_silu(self.norm2, _convolve(self.conv1, h, shift=modulation))
        h = F.dropout(h, s.dropout, self.training)
        if s.residual:
            h = self.rescale(_convolve(self.conv2, h, residual=self.shortcut(self.resample(x))))
        else:
            h = self.conv2(h)
        return self.attend(h)


class FusedOutputHead(OutputHead):
    def forward(self, x: Tensor) -> Tensor:
        return self.conv(_norm_silu(self.norm, x))


class FusedConvBlock(ConvBlock):
    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        shift, scale = self.modulation(embedding).chunk(2, dim=1)
        h = _norm_silu(self.norm2, self.conv1(_norm_silu(self.norm1, x)), scale, shift)
        return _convolve(self.conv2, self.dropout(h), residual=self.shortcut(x))


class FusedUViT(UViT):
    def head(self, x: Tensor) -> Tensor:
        return self.conv_out(_norm_silu(self.out_norm, x))


class FusedGridTables(GridTables):
    """FlexAttention's masks in place of windows, for grids on a GPU; made once for each grid."""

    _masks: dict[tuple[int, int, torch.device], Any] | None = None

    def forward(self, height: int, width: int) -> Grid:
        grid, device = super().forward(height, width), self.cos.device
        if self.kernel is None or device.type != "cuda":
            return grid
        self._masks = self._masks or {}
        key = (height, width, device)
        if key not in self._masks:
            self._masks[key] = near_pixels(height, width, self.kernel, device)
        return grid._replace(around=self._masks[key])

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_masks": None}


class FusedHDiTBlock(HDiTBlock):
    """Neighbourhood attention in one kernel, where the grid has FlexAttention's mask."""

    def attend_around(self, q: Tensor, k: Tensor, v: Tensor, around: Any) -> Tensor:
        if isinstance(around, Windows):
            return super().attend_around(q, k, v, around)
        return fused_neighbourhood_attention(q, k, v, around)


_FUSED: tuple[type[nn.Module], ...] = (FusedGroupNorm, FusedUNetBlock, FusedOutputHead, FusedConvBlock, FusedUViT)
_FUSED_ON_GPU: tuple[type[nn.Module], ...] = (FusedGridTables, FusedHDiTBlock)
_OWNERS = (UNetBlock, ConvResample, OutputHead, UNet, ConvBlock, UViT)  # their 3 × 3 convolutions pad with zeros


def _norm_silu(norm: nn.Module, x: Tensor, scale: Tensor | None = None, shift: Tensor | None = None) -> Tensor:
    """silu(norm(x)·(1 + scale) + shift) for a FusedGroupNorm or the identity."""
    if isinstance(norm, FusedGroupNorm):
        return norm(x, scale, shift, silu=True)
    return F.silu(x if scale is None or shift is None else scale_and_shift(x, scale, shift))


def _convolve(conv: nn.Conv2d, x: Tensor, shift: Tensor | None = None, residual: Tensor | None = None) -> Tensor:
    """conv(x) + shift + residual, in one operation if the convolution can add them."""
    if isinstance(conv, WinogradConv2d):
        return conv(x, shift, residual)
    y = conv(x)
    y = y if shift is None else y + shift[:, :, None, None].to(y.dtype)
    return y if residual is None else residual + y


def _mix_in(module: nn.Module, fused: type[nn.Module]) -> None:
    """Give a module the methods of `fused`; a class that FSDP2 made of the plain one stays underneath."""
    cls = type(module)
    module.__class__ = fused if cls is fused.__bases__[0] else type(f"Fused{cls.__name__}", (fused, cls), {})


def _is_3x3(conv: nn.Conv2d) -> bool:
    return conv.kernel_size == (3, 3) and conv.stride == (1, 1) and conv.padding == (1, 1)


def _fits_kernels(conv: nn.Conv2d) -> bool:
    return (
        conv.kernel_size == (3, 3)
        and (conv.stride, conv.dilation, conv.groups) == ((1, 1), (1, 1), 1)
        and conv.padding in ((0, 0), (1, 1))
        and conv.padding_mode == "zeros"
        and conv.in_channels % FLOAT32.lanes == conv.out_channels % FLOAT32.lanes == 0
    )
