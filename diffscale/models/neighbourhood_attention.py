"""Neighbourhood attention in plain torch: every pixel attends to the kernel × kernel window around it.

At the border the window moves inward, so every pixel sees equally many keys (Hassani et al. 2023, as NATTEN). Queries
are cut into tiles; a tile shares one rectangle of keys, which holds all their windows, and a mask picks each window.
So the work is a batch of ordinary, masked attentions on any device, about twice as many scores per side as needed.

On a GPU `fused_neighbourhood_attention` computes the same in one kernel, PyTorch's FlexAttention, which gathers nothing
and passes over the blocks of pixels that no window touches: at 64 × 64 pixels and a kernel of 7, 85 % of them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from diffscale.kernels.attention import attend_masked


class Windows(NamedTuple):
    """How a grid is cut into tiles, and the mask that belongs to it; the same for every layer on that grid.

    Index tensors int64. t and u are the pixels of a tile along the two axes, r and s the keys that it looks at.
    """

    row_queries: Tensor  # (row tiles, t); the last tile repeats its last pixel
    row_keys: Tensor  # (row tiles, r)
    column_queries: Tensor  # (column tiles, u)
    column_keys: Tensor  # (column tiles, s)
    mask: Tensor  # (tiles, t·u, r·s) bool, which of a tile's keys lie in a query's window


def windows(height: int, width: int, kernel: int, device: torch.device | None = None, tile: int = 8) -> Windows:
    """The windows of a grid of height × width pixels."""
    row_queries, row_keys, rows = cut(height, kernel, tile, device)
    column_queries, column_keys, columns = cut(width, kernel, tile, device)
    mask = rows[:, None, :, None, :, None] & columns[None, :, None, :, None, :]
    mask = mask.flatten(4, 5).flatten(2, 3).flatten(0, 1)
    return Windows(row_queries, row_keys, column_queries, column_keys, mask)


def cut(n: int, kernel: int, tile: int, device: torch.device | None) -> tuple[Tensor, Tensor, Tensor]:
    """Cut an axis of n pixels into tiles of at most `tile`; a kernel longer than the axis is as long as the axis.

    Returns the queries (tiles, t) and keys (tiles, r) of each tile, and whether a query sees a key (tiles, t, r) bool.
    """
    kernel, tiles = min(kernel, n), -(-n // tile)
    size = -(-n // tiles)
    reach = min(size + kernel - 1, n)
    first = torch.arange(tiles, device=device)[:, None] * size
    queries = (first + torch.arange(size, device=device)).clamp(max=n - 1)
    keys = (first - kernel // 2).clamp(0, n - reach) + torch.arange(reach, device=device)
    start = window_start(queries, kernel, n)[:, :, None]
    return queries, keys, (keys[:, None] >= start) & (keys[:, None] < start + kernel)


def window_start(at: Tensor, kernel: int, n: int) -> Tensor:
    """First pixel of the window around pixels `at` of an axis of n, of which kernel ≤ n are in the window."""
    return (at - kernel // 2).clamp(0, n - kernel)


def gather(x: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """(B, H, W, D) → (B, tiles, pixels of a tile, D), for indices (row tiles, p) and (column tiles, q)."""
    x = x.index_select(1, rows.flatten()).index_select(2, columns.flatten())
    x = x.unflatten(2, columns.shape).unflatten(1, rows.shape)
    return x.transpose(2, 3).flatten(3, 4).flatten(1, 2)


def neighbourhood_attention(q: Tensor, k: Tensor, v: Tensor, around: Windows) -> Tensor:
    """softmax(q·kᵀ) over each query's window, times v; no scaling. q, k, v and the result (B, heads, H, W, d)."""
    batch, heads, height, width, _ = q.shape
    rows, columns = around.row_queries, around.column_queries
    q = gather(q.flatten(0, 1), rows, columns)
    k, v = (gather(t.flatten(0, 1), around.row_keys, around.column_keys) for t in (k, v))
    out = attend_masked(q, k, v, around.mask)
    out = out.unflatten(1, (len(rows), len(columns))).unflatten(3, (rows.shape[1], columns.shape[1]))
    out = out.transpose(2, 3).flatten(3, 4).flatten(1, 2)
    return out[:, :height, :width].unflatten(0, (batch, heads))


def near_pixels(height: int, width: int, kernel: int, device: torch.device | None = None) -> Any:
    """Return FlexAttention's BlockMask of a grid: which blocks of 128 pixels, row by row, see each other, and how."""
    from torch.nn.attention.flex_attention import create_block_mask  # import cost

    across, along, pixels = min(kernel, height), min(kernel, width), height * width

    def near(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        down = key // width - window_start(query // width, across, height)
        right = key % width - window_start(query % width, along, width)
        return (down >= 0) & (down < across) & (right >= 0) & (right < along)

    return create_block_mask(near, None, None, pixels, pixels, device=str(device or "cpu"))


def fused_neighbourhood_attention(
    q: Tensor, k: Tensor, v: Tensor, near: Any, flex: Callable[..., Any] | None = None
) -> Tensor:
    """Return what `neighbourhood_attention` returns, by one kernel. q, k, v and the result (B, heads, H, W, d).

    near: from `near_pixels`
    flex: FlexAttention; by default it is compiled, which is what fuses it
    """
    from torch.nn.attention.flex_attention import flex_attention  # import cost

    attend: Callable[..., Any] = flex or (flex_attention if torch.compiler.is_compiling() else _compiled_flex())
    out = attend(*(t.flatten(2, 3) for t in (q, k, v)), block_mask=near, scale=1.0)
    return out.unflatten(2, q.shape[2:4])


@functools.cache
def _compiled_flex() -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention  # import cost

    return torch.compile(flex_attention, dynamic=False)
