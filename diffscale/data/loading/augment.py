"""Mirroring and EDM's non-leaking augmentations, on the device and keyed by (seed, position).

Karras et al., "Elucidating the Design Space of Diffusion-Based Generative Models" (2022), appendix F.2, with the
strengths of its CIFAR-10 runs. Each transformation is applied with probability p and passed to the network as a label,
so that samples drawn with a zero label show none of it. The transformations, labels and resampling are those of the
published pipe, with one difference: the pipe shares one margin over a batch, which may be too small for an image; here
each image has a margin that is large enough, so an image does not depend on the others in its batch.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import pywt
import torch
import torch.nn.functional as F
from torch import Tensor

from diffscale.core.keyed_random import Stream, at_step, normal, uniform

LABEL_SIZE = 9  # x flip, y flip, scale, cos(rotation) - 1, sin(rotation), anisotropy (2), translation (2)
SCALE_STD = 0.2  # of log2
ANISOTROPY_STD = 0.2  # of log2
TRANSLATION_STD = 0.125  # of the side
TURNED = 0.5  # probability that the axis of anisotropy is turned

SYM6 = tuple(pywt.Wavelet("sym6").dec_lo)  # 12 taps
AROUND = len(SYM6) // 4  # pixels around the image that shrinking needs


def mirror_images(x: Tensor, mirrored: Tensor, dim: int = 3) -> Tensor:
    """Mirror some images left to right. x: (B, ...) with four axes; mirrored: bool (B,); dim: the axis of columns."""
    return torch.where(mirrored[:, None, None, None], x.flip(dim), x)


def is_mirrored(seed: int, positions: Tensor) -> Tensor:
    """Return which images to mirror, bool (B,), each with probability 1/2."""
    return uniform(seed, Stream.FLIP, positions) < 0.5


def augment_images(x: Tensor, seed: int, positions: Tensor, p: float, *, flip: bool = True) -> tuple[Tensor, Tensor]:
    """Augment images; return them, in the same shape, and the labels, float32 (B, 9), zero for what was not applied.

    x: float32 (B, C, S, S) in [-1, 1]
    seed, positions: key of the draws; positions int64 (B,)
    p: probability of each transformation
    flip: mirror with probability 1/2
    """
    drawn = draw(seed, positions, p, flip)
    return transform(x, drawn), drawn.label()


class Drawn(NamedTuple):
    """The transformation of each image, all float64 (B,).

    Functions of these are rounded once, to float32, and therefore do not depend on the size of the batch.

    mirrored, inverted: 1 if flipped left to right, or upside down
    scale, strength, right, down: in units of their standard deviations; `strength` is that of the anisotropy
    angle, axis: in radians; `axis` is that of the anisotropy
    """

    mirrored: Tensor
    inverted: Tensor
    scale: Tensor
    angle: Tensor
    strength: Tensor
    axis: Tensor
    right: Tensor
    down: Tensor

    def label(self) -> Tensor:
        """Return the labels, float32 (B, 9)."""
        turn = [self.angle.cos() - 1, self.angle.sin()]
        stretch = [self.strength * self.axis.cos(), self.strength * self.axis.sin()]
        return torch.stack(
            [self.mirrored, self.inverted, self.scale, *turn, *stretch, self.right, self.down], dim=1
        ).float()


def draw(seed: int, positions: Tensor, p: float, flip: bool) -> Drawn:
    """Draw the transformations of the images at these positions."""
    u = uniform(seed, at_step(Stream.AUGMENT, 0), positions, (9,)).double().unbind(1)
    z = normal(seed, at_step(Stream.AUGMENT, 1), positions, (4,)).double().unbind(1)
    invert, scale, rotate, stretch, move = ((u[i] < p).double() for i in range(5))
    return Drawn(
        mirrored=is_mirrored(seed, positions).double() if flip else torch.zeros_like(u[0]),
        inverted=invert * (u[5] < 0.5),
        scale=scale * z[0],
        angle=rotate * (2 * u[6] - 1) * math.pi,
        strength=stretch * z[1],
        axis=(u[7] < TURNED) * (2 * u[8] - 1) * math.pi,
        right=move * z[2],
        down=move * z[3],
    )


def transform(x: Tensor, drawn: Drawn) -> Tensor:
    """Mirror the images (B, C, S, S), then scale, rotate, stretch and translate them."""
    x = torch.where(drawn.mirrored.bool()[:, None, None, None], x.flip(3), x)
    x = torch.where(drawn.inverted.bool()[:, None, None, None], x.flip(2), x)
    side = x.shape[-1]
    linear, shift = _inverse_map(drawn, side)
    margin = _margins(linear, shift, side)
    moved = drawn.label()[:, 2:].any(1)  # an identity map would change nothing
    for m in margin[moved].unique().tolist():
        chosen = torch.nonzero(moved & (margin == m)).flatten()
        x = x.index_copy(0, chosen, _resample(x[chosen], linear[chosen], shift[chosen], m))
    return x


def _inverse_map(drawn: Drawn, side: int) -> tuple[Tensor, Tensor]:
    """Return the maps (B, 2, 2) and (B, 2) from output to input coordinates, in pixels from the centre."""
    strength = drawn.strength * ANISOTROPY_STD
    stretch = torch.diag_embed(torch.stack([2**-strength, 2**strength], dim=1))
    stretch = _turn(-drawn.axis) @ stretch @ _turn(drawn.axis)
    linear = (2 ** (-SCALE_STD * drawn.scale))[:, None, None] * _turn(drawn.angle) @ stretch
    moved = torch.stack([drawn.right, drawn.down], dim=1) * (TRANSLATION_STD * side)
    return linear.float(), -(linear * moved[:, None, :]).sum(2).float()


def _turn(angle: Tensor) -> Tensor:
    """Return rotation matrices (B, 2, 2)."""
    c, s = angle.cos(), angle.sin()
    return torch.stack([torch.stack([c, -s], dim=1), torch.stack([s, c], dim=1)], dim=1)


def _margins(linear: Tensor, shift: Tensor, side: int) -> Tensor:
    """Return the margin that each image's map may reach, (B,) pixels, in a few sizes, at most S - 1."""
    far = linear.abs().sum(2).amax(1) * ((side - 1) / 2 + AROUND) + shift.abs().amax(1)
    step = max(8, side // 4)
    needed = (far - (side - 1) / 2 + 2 * AROUND).clamp_min(1)
    return ((needed / step).ceil() * step).clamp_max(side - 1).long()


def _resample(x: Tensor, linear: Tensor, shift: Tensor, margin: int) -> Tensor:
    """Reflect at the edges, double the resolution with the wavelet, resample bilinearly and halve it again."""
    side = x.shape[-1]
    x = F.pad(x, [margin] * 4, mode="reflect")
    fine = _double(_double(x).mT).mT
    # Pixel j of the doubled image lies at j / 2 - 1/4 of the plain one: hence the terms added to the map.
    target, source = 2 * (side + 2 * AROUND), fine.shape[-1]
    linear, offset = linear * (target / source), (linear.sum(2) - 1 + 4 * shift) / source
    u = (torch.arange(target, device=x.device) * 2 + 1) / target - 1
    across, down = linear[:, None, None, :, 0] * u[:, None], linear[:, None, None, :, 1] * u[:, None, None]
    grid = across + down + offset[:, None, None]
    fine = F.grid_sample(fine.contiguous(), grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    return _halve(_halve(fine).mT).mT[:, :, AROUND:-AROUND, AROUND:-AROUND]


def _double(x: Tensor) -> Tensor:
    """Double the columns: insert zeros between them and apply the wavelet backwards.

    It is a sum of shifted copies, because a library's convolution may round differently for another batch size."""
    n, taps, near = x.shape[-1], len(SYM6), len(SYM6) // 4
    x = F.pad(x, (near, near))
    even = sum(SYM6[taps - 1 - 2 * q] * x[..., q : q + n] for q in range(taps // 2))
    odd = sum(SYM6[taps - 2 - 2 * q] * x[..., q + 1 : q + 1 + n] for q in range(taps // 2))
    return torch.stack([even, odd], dim=-1).flatten(-2)


def _halve(x: Tensor) -> Tensor:
    """Apply the wavelet at every other column."""
    n, pad = x.shape[-1] // 2, (len(SYM6) - 1) // 2
    x = F.pad(x, (pad, pad))
    return sum(tap * x[..., k : k + 2 * n - 1 : 2] for k, tap in enumerate(SYM6))
