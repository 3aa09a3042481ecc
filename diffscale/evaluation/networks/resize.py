"""Resizes images to a feature network's input, and samples to a common resolution of evaluation.

Each filter is a matrix, applied to rows and columns as two products: exact to the last bit or two of float32, fast
on any device, and the same for reference and samples.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from PIL import Image
from torch import Tensor

FILTERS = ("tf1_bilinear", "clean_bicubic", "antialiased_bilinear")
RESIZES = {"default": None, "tf1": "tf1_bilinear", "clean": "clean_bicubic", "antialiased": "antialiased_bilinear"}
"""The setting `eval.resize`: a filter, or None for the network's own."""


def resize(images: Tensor, size: int, filter_name: str) -> Tensor:
    """Resize images (B,C,H,W) float32 in 0..255 to (B,C,size,size). Raises ValueError for an unknown filter.

    tf1_bilinear: TensorFlow 1's resize_bilinear(align_corners=False), which the original FID used; no antialiasing.
    clean_bicubic: Pillow's antialiased bicubic in float with clipping, as in clean-fid (Parmar et al. 2022).
    antialiased_bilinear: Pillow's antialiased bilinear.
    """
    if filter_name not in FILTERS:
        raise ValueError(f"resize {filter_name!r}: expected one of {', '.join(FILTERS)}")
    height, width = images.shape[-2:]
    if filter_name != "tf1_bilinear" and (height, width) == (size, size):
        return images
    rows = _matrix_on(filter_name, height, size, images.device)
    columns = _matrix_on(filter_name, width, size, images.device)
    out = torch.matmul(rows, torch.matmul(images, columns.T))
    return out.clamp(0, 255) if filter_name == "clean_bicubic" else out


@lru_cache(maxsize=64)
def _matrix_on(filter_name: str, source: int, target: int, device: torch.device) -> Tensor:
    """Keep the matrix on the device: a copy for each group of images would make the GPU wait."""
    return _matrix(filter_name, source, target).to(device)


@lru_cache(maxsize=64)
def _matrix(filter_name: str, source: int, target: int) -> Tensor:
    """Weights (target, source): output pixel i is the sum over j of weight[i, j] * input pixel j."""
    weights = torch.zeros(target, source, dtype=torch.float32)
    if filter_name == "tf1_bilinear":
        # The position is i * scale (no half-pixel centre), in float32 as in TensorFlow's kernel.
        position = torch.arange(target, dtype=torch.float32) * torch.tensor(source / target, dtype=torch.float32)
        low = position.long()
        weights[torch.arange(target), low] += 1 - (position - low)
        weights[torch.arange(target), (low + 1).clamp_max(source - 1)] += position - low
        return weights
    kernel, support = (_cubic, 2.0) if filter_name == "clean_bicubic" else (_triangle, 1.0)
    scale = max(source / target, 1.0)
    for i in range(target):
        centre = (i + 0.5) * source / target
        first = max(int(centre - support * scale + 0.5), 0)
        last = min(int(centre + support * scale + 0.5), source)
        taps = kernel((np.arange(first, last) + 0.5 - centre) / scale)
        weights[i, first:last] = torch.from_numpy(taps / taps.sum()).float()
    return weights


def _triangle(x: np.ndarray) -> np.ndarray:
    return np.maximum(1 - np.abs(x), 0)


def _cubic(x: np.ndarray, a: float = -0.5) -> np.ndarray:
    x = np.abs(x)
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = (((x - 5) * x + 8) * x - 4) * a
    return np.where(x < 1, near, np.where(x < 2, far, 0.0))


def upsample(images: Tensor, size: int) -> Tensor:
    """Enlarge images (B,C,H,W) uint8 to (B,C,size,size) by Pillow's LANCZOS; unchanged if they have that size.

    Samples of any resolution are compared at one common resolution (CONTRIBUTING.md, decision 1). Raises ValueError
    for larger images: a resolution of evaluation is never below the training resolution.
    """
    height, width = images.shape[-2:]
    if (height, width) == (size, size):
        return images
    if max(height, width) > size:
        raise ValueError(f"eval_resolution {size} is below the images' {height}x{width}")
    pixels = images.permute(0, 2, 3, 1).cpu().numpy()
    if pixels.shape[-1] == 1:
        pixels = pixels[..., 0]
    enlarged = [np.asarray(Image.fromarray(p).resize((size, size), Image.Resampling.LANCZOS)) for p in pixels]
    out = torch.from_numpy(np.stack(enlarged))
    return (out[..., None] if out.ndim == 3 else out).permute(0, 3, 1, 2).contiguous()
