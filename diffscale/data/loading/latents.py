"""Latents as a network trains on them: drawn from what a dataset stores about each image."""

from __future__ import annotations

import torch
from torch import Tensor

from diffscale.core.keyed_random import Stream, normal
from diffscale.data.format.manifest import Encoding


def draw_latents(
    stored: Tensor, encoding: Encoding | None, seed: int, positions: Tensor, mirrored: Tensor | None = None
) -> Tensor:
    """Return latents (B, C, h, w) float32, drawn from the encoder's posterior by (seed, position): anew in each epoch.

    stored: (B, S, h, w), as `data build --encode` stores them: mean and standard deviation, then those of the mirrored
        image if there are any; without an encoding, latents that are used as they are
    positions: int64 (B,)
    mirrored: bool (B,), whether to take the mirrored image's; None takes none
    """
    if encoding is None:
        return stored.float()
    if encoding.mirrored:
        plain, other = stored.chunk(2, dim=1)
        stored = plain if mirrored is None else torch.where(mirrored[:, None, None, None], other, plain)
    mean, std = stored.float().chunk(2, dim=1)
    return normal(seed, Stream.LATENT, positions, tuple(mean.shape[1:])).mul_(std).add_(mean)
