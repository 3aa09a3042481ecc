"""Pictures of sampling: the way from noise to image, a row for each sample."""

from __future__ import annotations

import numpy as np
import torch

from diffscale.core import image_grids
from diffscale.diffusion import Evaluation
from diffscale.evaluation.sampling import ModelSource, to_uint8

FRAMES = 10


def trajectories(source: ModelSource, count: int) -> bytes:
    """Return a PNG from noise to image, one row for each of the first `count` samples, in ten steps at most.

    It shows the noisy image as the network sees it, divided by its own standard deviation.
    """
    frames: list[tuple[float, torch.Tensor]] = []
    final, _ = source.draw(torch.arange(count), lambda seen: frames.append((seen.logsnr, _visible(seen))))
    chosen = np.unique(np.linspace(0, len(frames) - 1, FRAMES).astype(int))
    stack = [to_uint8(source.decoded(x)) for x in [*(frames[i][1] for i in chosen), final]]
    captions = [f"logsnr {frames[i][0]:.1f}" for i in chosen] + ["image"]
    pixels = torch.stack(stack).permute(0, 1, 3, 4, 2).cpu().numpy()
    return image_grids.to_png(image_grids.strips(pixels, captions))


def _visible(seen: Evaluation) -> torch.Tensor:
    scale = seen.z.std(dim=(1, 2, 3), keepdim=True).clamp(min=1e-6)
    return torch.where(scale > 1, seen.z / scale, seen.z).float()
