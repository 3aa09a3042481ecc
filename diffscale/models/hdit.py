"""HDiT: hourglass diffusion transformer for pixels (Crowson et al. 2024, arXiv 2401.11605), after the released code.

Levels of transformer layers at falling resolution, with neighbourhood attention everywhere but in the coarsest, so that
cost grows linearly with the number of pixels. 2 × 2 tokens merge on the way down and split on the way up, where a
learned interpolation joins them with the skip.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffscale.core.errors import SettingError
from diffscale.core.ranges import Depth, DepthOrZero, DropRate, Factor, Size, SizeOrZero
from diffscale.kernels.attention import attend
from diffscale.models.layers import (
    Backbone,
    FourierEmbedding,
    LabelEmbedding,
    noise_condition,
    pad_to_multiple,
    without_autocast,
)
from diffscale.models.neighbourhood_attention import Windows, neighbourhood_attention, windows
from diffscale.models.transformer_layers import hidden_width, patch_side, rms_normalise


class GEGLU(nn.Module):
    """Linear to 2·hidden, value times GELU(gate), dropout, Linear back; no biases. The last one starts at zero."""

    def __init__(self, width: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.up = nn.Linear(width, 2 * hidden, bias=False)
        self.dropout = nn.Dropout(dropout)
        self.down = nn.Linear(hidden, width, bias=False)
        nn.init.zeros_(self.down.weight)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.up(x).chunk(2, dim=-1)
        return self.down(self.dropout(value * F.gelu(gate)))


class Mapping(nn.Module):
    """RMS norm, residual GEGLU blocks, RMS norm: the sum of the embeddings → the condition. (B, M) → (B, M)."""

    def __init__(self, width: int, depth: int, hidden: int) -> None:
        super().__init__()
        self.gains = nn.ParameterList(torch.ones(width) for _ in range(depth + 2))
        self.blocks = nn.ModuleList(GEGLU(width, hidden, dropout=0.0) for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        first, *inner, last = self.gains
        x = rms_normalise(x, first)
        for gain, block in zip(inner, self.blocks, strict=True):
            x = x + block(rms_normalise(x, gain))
        return rms_normalise(x, last)


class Grid(NamedTuple):
    """What the layers of one level share."""

    cos: Tensor  # (heads, H, W, head/4), of the angles by which the rotary positions turn each head
    sin: Tensor
    around: Any  # which pixels a pixel sees: Windows, FlexAttention's mask (accelerate.py), or None for all of them


class GridTables(nn.Module):
    """The `Grid` of a level. That of the native size is kept in buffers, which are not in the state dict.

    kernel: side of the neighbourhood, None for global attention
    """

    def __init__(self, native: tuple[int, int], heads: int, head: int, kernel: int | None) -> None:
        super().__init__()
        self.native, self.heads, self.head, self.kernel = native, heads, head, kernel
        self.cos: Tensor
        self.sin: Tensor
        kept = self.make(*native)
        around = {} if kept.around is None else kept.around._asdict()
        for name, table in ({"cos": kept.cos, "sin": kept.sin} | around).items():
            self.register_buffer(name, table, persistent=False)

    def make(self, height: int, width: int, device: torch.device | None = None) -> Grid:
        """Make the tables of a grid of height × width tokens."""
        count = self.head // 8
        turns = torch.linspace(math.log(math.pi), math.log(10 * math.pi), self.heads * count + 1, device=device)
        frequencies = turns[:-1].exp().view(count, self.heads).T.contiguous()
        positions = axial_positions(height, width, device)
        angles = (positions[None, :, :, :, None] * frequencies[:, None, None, None]).flatten(-2)
        around = None if self.kernel is None else windows(height, width, self.kernel, device)
        return Grid(angles.cos(), angles.sin(), around)

    def forward(self, height: int, width: int) -> Grid:
        """Return the tables of a grid of height × width tokens, kept or made on the device."""
        if (height, width) != self.native:
            return self.make(height, width, self.cos.device)
        around = None if self.kernel is None else Windows(*(getattr(self, name) for name in Windows._fields))
        return Grid(self.cos, self.sin, around)


class HDiTBlock(nn.Module):
    """Cosine-similarity attention, global or in windows, then a GEGLU; RMS norms scaled by 1 + Linear(condition).

    The output projections and the scales' layers start at zero.
    """

    def __init__(self, width: int, head: int, hidden: int, condition: int, dropout: float) -> None:
        super().__init__()
        self.heads = width // head
        self.scale1, self.scale2 = (nn.Linear(condition, width, bias=False) for _ in range(2))
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.sharpness = nn.Parameter(torch.full((self.heads,), 10.0))
        self.dropout = nn.Dropout(dropout)
        self.out = nn.Linear(width, width, bias=False)
        self.mlp = GEGLU(width, hidden, dropout)
        for layer in (self.scale1, self.scale2, self.out):
            nn.init.zeros_(layer.weight)

    def forward(self, x: Tensor, condition: Tensor, grid: Grid) -> Tensor:
        """x (B, H, W, D), condition (B, M) → (B, H, W, D)."""
        h = rms_normalise(x, 1 + self.scale1(condition)[:, None, None])
        q, k, v = self.qkv(h).unflatten(-1, (3, self.heads, -1)).permute(3, 0, 4, 1, 2, 5)
        q, k = (self.prepare(t, grid.cos, grid.sin) for t in (q, k))
        if grid.around is None:
            q = q * math.sqrt(q.shape[-1])  # undoes attend's own scaling
            h = attend(*(t.flatten(2, 3) for t in (q, k, v))).unflatten(2, x.shape[1:3])
        else:
            h = self.attend_around(q, k, v, grid.around)
        x = x + self.out(self.dropout(h.permute(0, 2, 3, 1, 4).flatten(3)))
        return x + self.mlp(rms_normalise(x, 1 + self.scale2(condition)[:, None, None]))

    def attend_around(self, q: Tensor, k: Tensor, v: Tensor, around: Windows) -> Tensor:
        """Neighbourhood attention, without scaling. (B, heads, H, W, d) each."""
        return neighbourhood_attention(q, k, v, around)

    def prepare(self, t: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Length √sharpness, and the first half of the channels turned by the angles. t (B, heads, H, W, d)."""
        wide = t.float()
        wide = wide * torch.rsqrt(wide.square().sum(-1, keepdim=True) + 1e-6)
        wide = wide * self.sharpness.sqrt()[:, None, None, None]
        d = cos.shape[-1]
        a, b, rest = wide.split([d, d, wide.shape[-1] - 2 * d], dim=-1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], dim=-1).to(t.dtype)


class Split(nn.Module):
    """Linear, 2 × 2 tokens from each, then a learned interpolation from the skip to them, starting half-way."""

    def __init__(self, below: int, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(below, 4 * width, bias=False)
        self.share = nn.Parameter(torch.full((1,), 0.5))

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        """x (B, H, W, below), skip (B, 2H, 2W, width) → (B, 2H, 2W, width)."""
        x = spread(self.linear(x), 2)
        return skip + self.share.to(x.dtype) * (x - skip)


def fold(x: Tensor, side: int) -> Tensor:
    """(B, H, W, D) → (B, H/side, W/side, side²·D), each square's pixels row by row."""
    x = x.unflatten(2, (-1, side)).unflatten(1, (-1, side))
    return x.transpose(2, 3).flatten(3)


def spread(x: Tensor, side: int) -> Tensor:
    """The inverse of `fold`."""
    x = x.unflatten(-1, (side, side, -1)).transpose(2, 3)
    return x.flatten(3, 4).flatten(1, 2)


def axial_positions(height: int, width: int, device: torch.device | None = None) -> Tensor:
    """Centres of the pixels, (H, W, 2) as (row, column), the longer side spanning −1 … 1."""
    longest = max(height, width)
    rows, columns = ((2 * torch.arange(n, device=device) + 1 - n) / longest for n in (height, width))
    return torch.stack(torch.meshgrid(rows, columns, indexing="ij"), dim=-1)


class HDiT(Backbone):
    """forward(x_in (B, C, H, W), logsnr (B,), label | None, state) → (prediction (B, C, H, W), None).

    Optional keyword: augment_label (B, augment_dim) of non-leaking augmentation, None for zeros. Any H and W: the input
    is padded inside to a multiple of patch_size · 2^(levels − 1) and the output cropped. The label `num_classes` and
    label=None mean "no label". As initialised the output is exactly zero.
    """

    def __init__(
        self,
        resolution: int,
        channels: int = 3,
        num_classes: int = 0,
        *,
        patch_size: Size = 4,  # side of a patch in pixels
        widths: tuple[Size, ...] = (128, 256, 512),  # width of the tokens per level, finest first; each halves the side
        depths: tuple[Depth, ...] = (2, 2, 4),  # layers per level, on the way down and again up; last: once
        head: Size = 64,  # width of a head, a multiple of 8 and a divisor of every width
        kernel: Size = 7,  # side of the neighbourhood, odd
        global_levels: SizeOrZero = 1,  # number of the coarsest levels that attend to the whole grid instead
        mlp_ratio: Factor = 3.0,  # hidden width of the GEGLU over the width
        dropout: tuple[DropRate, ...] = (),  # dropout per level; empty: none
        mapping_width: Size = 256,  # width of the condition, an even number
        mapping_depth: DepthOrZero = 2,  # blocks of the mapping network
        augment_dim: SizeOrZero = 0,  # width of augment_label; 0: no such input; the released networks have 9
    ) -> None:
        super().__init__()
        if not widths or len(widths) != len(depths) or len(dropout) not in (0, len(widths)):
            given = f"{len(depths)} depths, {len(dropout)} rates of dropout"
            raise SettingError(
                "widths", widths, f"at least one, one depth and one (or no) dropout for each; here {given}"
            )
        if not 0 <= global_levels <= len(widths):
            raise SettingError("global_levels", global_levels, f"0 to {len(widths)}, the number of levels")
        if kernel < 1 or kernel % 2 == 0:
            raise SettingError("kernel", kernel, "an odd number")
        if head < 1 or head % 8 or any(width % head for width in widths):
            raise SettingError("head", head, f"a multiple of 8 and a divisor of every width in {widths}")
        self.multiple = patch_side("patch_size", patch_size, resolution, 2 ** (len(widths) - 1))
        self.patch, self.augment_dim = patch_size, augment_dim

        self.patch_in = nn.Linear(channels * patch_size**2, widths[0], bias=False)
        self.embed_noise = FourierEmbedding(mapping_width, bandwidth=1.0)
        self.noise_in = nn.Linear(mapping_width, mapping_width, bias=False)
        self.augment_frequencies: Tensor
        if augment_dim:
            self.register_buffer("augment_frequencies", torch.randn(mapping_width // 2, augment_dim))
        self.augment_in = nn.Linear(mapping_width, mapping_width, bias=False) if augment_dim else None
        self.num_classes = num_classes
        self.embed_label = LabelEmbedding(num_classes, mapping_width) if num_classes else None
        self.mapping = Mapping(mapping_width, mapping_depth, 3 * mapping_width)

        def layers(level: int) -> nn.ModuleList:
            hidden, rate = hidden_width(widths[level], mlp_ratio), dropout[level] if dropout else 0.0
            return nn.ModuleList(
                HDiTBlock(widths[level], head, hidden, mapping_width, rate) for _ in range(depths[level])
            )

        def tables(level: int) -> GridTables:
            side = -(-resolution // self.multiple) * 2 ** (len(widths) - 1 - level)
            local = level < len(widths) - global_levels
            return GridTables((side, side), widths[level] // head, head, kernel if local else None)

        self.grids = nn.ModuleList(tables(level) for level in range(len(widths)))
        outer = range(len(widths) - 1)
        self.down, self.up = (nn.ModuleList(layers(level) for level in outer) for _ in range(2))
        self.middle = layers(len(widths) - 1)
        self.merges = nn.ModuleList(nn.Linear(4 * widths[i], widths[i + 1], bias=False) for i in outer)
        self.splits = nn.ModuleList(Split(widths[i + 1], widths[i]) for i in outer)
        self.out_gain = nn.Parameter(torch.ones(widths[0]))
        self.patch_out = nn.Linear(widths[0], channels * patch_size**2, bias=False)
        nn.init.zeros_(self.patch_out.weight)

    def embed(self, logsnr: Tensor, label: Tensor | None, augment_label: Tensor | None) -> Tensor:
        """(B,) log SNR and the optional labels → (B, M), the condition of every layer; always in float32."""
        vector = self.noise_in(self.embed_noise(noise_condition(logsnr, "edm")))
        if self.augment_in is not None:
            if augment_label is None:
                augment_label = torch.zeros(len(logsnr), self.augment_dim, device=logsnr.device)
            angles = 2 * math.pi * augment_label.float() @ self.augment_frequencies.T
            vector = vector + self.augment_in(torch.cat([angles.cos(), angles.sin()], dim=-1))
        if self.embed_label is not None:
            vector = vector + self.embed_label(label, len(logsnr))
        return self.mapping(vector)

    def run(self, layers: nn.Module, x: Tensor, condition: Tensor, level: int) -> Tensor:
        """One stack of layers on the grid of x (B, H, W, D), which is that of a level (0 is the finest)."""
        grid = self.grids[level](*x.shape[1:3])
        for layer in layers.children():
            x = self.run_block(layer, x, condition, grid)
        return x

    def forward(
        self,
        x_in: Tensor,
        logsnr: Tensor,
        label: Tensor | None = None,
        state: Tensor | None = None,
        *,
        augment_label: Tensor | None = None,
    ) -> tuple[Tensor, None]:
        height, width = x_in.shape[2:]
        with without_autocast(x_in.device):
            condition = self.embed(logsnr, label, augment_label)
        x = pad_to_multiple(x_in, self.multiple).permute(0, 2, 3, 1)
        x = self.patch_in(fold(x, self.patch))
        skips = []
        for level, (layers, merge) in enumerate(zip(self.down, self.merges, strict=True)):
            x = self.run(layers, x, condition, level)
            skips.append(x)
            x = merge(fold(x, 2))
        x = self.run(self.middle, x, condition, len(self.down))
        for layers, split in zip(reversed(self.up), reversed(self.splits), strict=True):
            x = split(x, skips.pop())
            x = self.run(layers, x, condition, len(skips))
        x = spread(self.patch_out(rms_normalise(x, self.out_gain)), self.patch).permute(0, 3, 1, 2)
        return x[:, :, :height, :width].to(x_in.dtype), None

    def blocks_for_fsdp(self) -> list[nn.Module]:
        stacks = [*self.down, self.middle, *reversed(self.up)]
        return [layer for stack in stacks for layer in stack.children()]

    def no_weight_decay(self) -> set[str]:
        names = {"noise_in.weight", "augment_in.weight", "embed_label.weight"}
        return names & {name for name, _ in self.named_parameters()}
