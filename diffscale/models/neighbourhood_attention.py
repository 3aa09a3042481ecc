"""Neighbourhood attention in plain torch: every pixel attends to the kernel × kernel window around it.

At the border the window moves inward, so every pixel sees equally many keys (Hassani et al. 2023, as NATTEN). Queries
are cut into tiles; a tile shares one rectangle of keys, which holds all their windows, and a mask picks each window.
So the work is a batch of ordinary, masked attentions on any device, about twice as many scores per side as needed.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from diffscale.kernels.attention import attend_masked


class Axis(NamedTuple):
    """How one axis of n pixels is cut. All index tensors int64."""

    queries: Tensor  # (tiles, t) the pixels of each tile; the last tile repeats its last pixel
    keys: Tensor  # (tiles, r) the keys that a tile looks at
    seen: Tensor  # (tiles, t, r) bool, which of them lie in a query's window


def cut(n: int, kernel: int, tile: int, device: torch.device) -> Axis:
    """n pixels into tiles of at most `tile`; a kernel longer than the axis is as long as the axis."""
    kernel, tiles = min(kernel, n), -(-n // tile)
    size = -(-n // tiles)
    reach = min(size + kernel - 1, n)
    first = torch.arange(tiles, device=device)[:, None] * size
    queries = (first + torch.arange(size, device=device)).clamp(max=n - 1)
    keys = (first - kernel // 2).clamp(0, n - reach) + torch.arange(reach, device=device)
    start = (queries - kernel // 2).clamp(0, n - kernel)[:, :, None]
    return Axis(queries, keys, (keys[:, None] >= start) & (keys[:, None] < start + kernel))


class Windows(NamedTuple):
    """The cut of a grid and the mask that belongs to it; the same for every layer on that grid."""

    rows: Axis
    columns: Axis
    mask: Tensor  # (tiles, queries per tile, keys per tile) bool


def windows(height: int, width: int, kernel: int, device: torch.device, tile: int = 8) -> Windows:
    """The windows of a grid of height × width pixels."""
    rows, columns = cut(height, kernel, tile, device), cut(width, kernel, tile, device)
    mask = rows.seen[:, None, :, None, :, None] & columns.seen[None, :, None, :, None, :]
    return Windows(rows, columns, mask.flatten(4, 5).flatten(2, 3).flatten(0, 1))


def gather(x: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """(B, H, W, D) → (B, tiles, pixels of a tile, D), for indices (row tiles, p) and (column tiles, q)."""
    x = x.index_select(1, rows.flatten()).index_select(2, columns.flatten())
    x = x.unflatten(2, columns.shape).unflatten(1, rows.shape)
    return x.transpose(2, 3).flatten(3, 4).flatten(1, 2)


def neighbourhood_attention(q: Tensor, k: Tensor, v: Tensor, around: Windows) -> Tensor:
    """softmax(q·kᵀ) over each query's window, times v; no scaling. q, k, v and the result (B, heads, H, W, d)."""
    batch, heads, height, width, _ = q.shape
    rows, columns = around.rows, around.columns
    q = gather(q.flatten(0, 1), rows.queries, columns.queries)
    k, v = (gather(t.flatten(0, 1), rows.keys, columns.keys) for t in (k, v))
    out = attend_masked(q, k, v, around.mask)
    grid = (rows.queries.shape[0], columns.queries.shape[0], rows.queries.shape[1], columns.queries.shape[1])
    out = out.unflatten(1, grid[:2]).unflatten(3, grid[2:]).transpose(2, 3).flatten(3, 4).flatten(1, 2)
    return out[:, :height, :width].unflatten(0, (batch, heads))
