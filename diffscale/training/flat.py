"""Many tensors as views of one buffer, so that one kernel computes with all of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def flat_like(tensors: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """Return a buffer of zeros, float32 (n,), and its views: one for each tensor, with the tensor's shape and strides.

    Equal strides let PyTorch's fused operations on lists take the tensors and the views together.

    tensors: on one device
    """
    flat = torch.zeros(sum(t.numel() for t in tensors), dtype=torch.float32, device=tensors[0].device)
    parts = flat.split([t.numel() for t in tensors])
    return flat, [_view(part, tensor) for part, tensor in zip(parts, tensors, strict=True)]


def _view(part: Tensor, tensor: Tensor) -> Tensor:
    dense = tensor.is_contiguous() or tensor.is_contiguous(memory_format=torch.channels_last)
    if dense and tensor.ndim == 4:
        return part.as_strided(tensor.shape, tensor.stride())
    return part.view(tensor.shape)
