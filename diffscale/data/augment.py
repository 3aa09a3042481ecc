"""Mirroring, and EDM's non-leaking augmentations, on the device and keyed by (seed, position).

Karras et al., "Elucidating the Design Space of Diffusion-Based Generative Models" (2022), appendix F.2, with the
strengths of its CIFAR-10 runs: each transformation is applied with probability p and told to the network in a label,
so that samples drawn with a zero label show none of it. Differs from the published pipe in the resampling only: twice
the resolution by bicubic interpolation and back by an antialiased one, instead of a wavelet filter; images that no
geometric transformation was drawn for are not resampled.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from diffscale.keyed_random import Stream, at_step, normal, uniform

LABEL_SIZE = 9  # x flip, y flip, log2 scale, cos(rotation) - 1, sin(rotation), anisotropy (2), translation (2)
SCALE_STD = 0.2  # of log2
ANISOTROPY_STD = 0.2  # of log2
TRANSLATION_STD = 0.125  # of the side
DIAGONAL = 0.5  # probability that the axis of anisotropy is turned


def flip_images(x: Tensor, seed: int, positions: Tensor) -> Tensor:
    """Mirrors (B, C, H, W) left to right, each with probability 1/2."""
    return torch.where(_mirrored(seed, positions)[:, None, None, None], x.flip(3), x)


def augment_images(x: Tensor, seed: int, positions: Tensor, p: float, *, flip: bool = True) -> tuple[Tensor, Tensor]:
    """x: float32 (B, C, S, S) in [-1, 1]; p: probability of each transformation; flip: mirror with probability 1/2.

    Returns the images, the same shape, and the label float32 (B, 9): zero where nothing was done.
    """
    u = uniform(seed, at_step(Stream.AUGMENT, 0), positions, (9,)).unbind(1)
    z = normal(seed, at_step(Stream.AUGMENT, 1), positions, (4,)).unbind(1)
    gates = {name: (u[i] < p).float() for i, name in enumerate(("y", "scale", "rotate", "aniso", "translate"))}
    x_flip = _mirrored(seed, positions).float() if flip else torch.zeros_like(u[0])
    y_flip = gates["y"] * (u[5] < 0.5)
    scale = gates["scale"] * z[0] * SCALE_STD
    angle = gates["rotate"] * (2 * u[6] - 1) * math.pi
    aniso = gates["aniso"] * z[1] * ANISOTROPY_STD
    axis = (u[7] < DIAGONAL) * (2 * u[8] - 1) * math.pi
    tx, ty = gates["translate"] * z[2] * TRANSLATION_STD, gates["translate"] * z[3] * TRANSLATION_STD
    label = torch.stack(
        [x_flip, y_flip, scale, angle.cos() - 1, angle.sin(), aniso * axis.cos(), aniso * axis.sin(), tx, ty], dim=1
    )
    x = torch.where(x_flip.bool()[:, None, None, None], x.flip(3), x)
    x = torch.where(y_flip.bool()[:, None, None, None], x.flip(2), x)
    moved = torch.nonzero(label[:, 2:].abs().sum(1)).flatten()
    if len(moved):
        theta = _inverse_map(scale[moved], angle[moved], aniso[moved], axis[moved], tx[moved], ty[moved])
        x = x.index_copy(0, moved, _resample(x[moved], theta))
    return x, label


def _mirrored(seed: int, positions: Tensor) -> Tensor:
    return uniform(seed, Stream.FLIP, positions) < 0.5


def _inverse_map(scale: Tensor, angle: Tensor, aniso: Tensor, axis: Tensor, tx: Tensor, ty: Tensor) -> Tensor:
    """(B, 2, 3): from a place in the output to the place in the input, in units of half the side from the centre.

    The image is scaled, turned, stretched along `axis` and then moved; the inverse runs backwards.
    """
    stretch = _turn(axis) @ torch.diag_embed(torch.stack([2**-aniso, 2**aniso], dim=1)) @ _turn(-axis)
    linear = (2**-scale)[:, None, None] * _turn(-angle) @ stretch
    shift = torch.stack([tx, ty], dim=1)[:, :, None] * -2
    return torch.cat([linear, linear @ shift], dim=2)


def _turn(angle: Tensor) -> Tensor:
    """Rotation matrices (B, 2, 2)."""
    c, s = angle.cos(), angle.sin()
    return torch.stack([torch.stack([c, -s], dim=1), torch.stack([s, c], dim=1)], dim=1)


def _resample(x: Tensor, theta: Tensor) -> Tensor:
    """Samples at twice the resolution and shrinks with an antialiasing filter; mirrored beyond the edges."""
    size = x.shape[-2:]
    fine = F.interpolate(x, scale_factor=2, mode="bicubic", align_corners=False)
    grid = F.affine_grid(theta, list(fine.shape), align_corners=False)
    turned = F.grid_sample(fine, grid, mode="bilinear", padding_mode="reflection", align_corners=False)
    return F.interpolate(turned, size=size, mode="bicubic", antialias=True, align_corners=False).clamp_(-1, 1)
