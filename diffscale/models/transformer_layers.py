"""Parts that the token-based backbones (DiT, JiT, RIN, UViT) share: patches, positions, embeddings, initialisation.

Shapes: B batch, C channels, H × W image, h × w grid of patches, N = h·w tokens, D width, p side of a patch.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffscale.core.errors import SettingError
from diffscale.models.layers import SinusoidalEmbedding


def patch_side(name: str, patch_size: int, resolution: int, fold: int = 1) -> int:
    """Return the side in pixels of a square that patches of `patch_size`, folded `fold` times over, need.

    Raises SettingError unless it fits an image of side `resolution`.

    name: the setting that is wrong where it does not fit
    fold: number of patches along the side of the coarsest token
    """
    if resolution < 1:
        raise SettingError("resolution", resolution, "a positive side")
    if not 1 <= patch_size * fold <= resolution:
        levels = f": the levels fold {fold} x {fold} patches" if fold > 1 else ""
        raise SettingError(name, patch_size, f"1 to {resolution // fold} at a resolution of {resolution}{levels}")
    return patch_size * fold


def head_width(name: str, heads: int, width: int, multiple: int = 1) -> int:
    """Width of one of `heads` heads. SettingError unless they divide the width into multiples of `multiple`."""
    if heads < 1 or width % heads or (width // heads) % multiple:
        of = f" with a quotient divisible by {multiple}" if multiple > 1 else ""
        raise SettingError(name, heads, f"a divisor of the width {width}{of}")
    return width // heads


def hidden_width(width: int, ratio: float) -> int:
    """Hidden width of an MLP whose `mlp_ratio` is `ratio`. SettingError if nothing would be left."""
    if int(width * ratio) < 1:
        raise SettingError("mlp_ratio", ratio, f"at least {1 / width:.3g}, one hidden unit for the width {width}")
    return int(width * ratio)


def unpatchify(tokens: Tensor, height: int, width: int, patch: int) -> Tensor:
    """(B, h·w, p·p·C), each token's values in the order (row, column, channel) → (B, C, h·p, w·p)."""
    grid = tokens.unflatten(1, (height, width)).unflatten(-1, (patch, patch, -1))
    return grid.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)


def sincos_positions(
    height: int,
    width: int,
    dim: int,
    native: tuple[int, int],
    max_period: float = 1e4,
    device: torch.device | None = None,
) -> Tensor:
    """Fixed sine-cosine positions of a grid, (h·w, dim), dim divisible by 4 (He et al. 2022, as DiT uses them).

    The first half of the channels encodes the column, the second the row; within each, sines before cosines. A grid
    other than the native (rows, columns) is stretched over the same coordinates, so that a network runs at any size.
    """
    if dim % 4:
        raise SettingError("width", dim, "a multiple of 4 for the two-dimensional positions")
    wide = torch.float64
    omega = max_period ** -(torch.arange(dim // 4, dtype=wide, device=device) / (dim // 4))
    axes = [
        torch.arange(n, dtype=wide, device=device) * (full / n) for n, full in zip((height, width), native, strict=True)
    ]
    rows, columns = (torch.cat([(a := x[:, None] * omega).sin(), a.cos()], dim=1) for x in axes)
    table = torch.cat([columns.expand(height, -1, -1), rows[:, None].expand(-1, width, -1)], dim=-1)
    return table.flatten(0, 1).float()


def fixed_positions(table: Tensor, native: tuple[int, int], height: int, width: int) -> Tensor:
    """The sine-cosine table of the native grid, or the one of another grid stretched over it. (h·w, D)."""
    if (height, width) == native:
        return table
    return sincos_positions(height, width, table.shape[1], native, device=table.device)


def resize_positions(table: Tensor, native: tuple[int, int], height: int, width: int) -> Tensor:
    """Learned positions (h₀·w₀, D) of the native grid → (h·w, D), bilinearly where the grid is another."""
    if (height, width) == native:
        return table
    grid = table.unflatten(0, native).permute(2, 0, 1)[None]
    grid = F.interpolate(grid, (height, width), mode="bilinear", align_corners=False)
    return grid[0].permute(1, 2, 0).flatten(0, 1)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x·(1 + scale) + shift. x (B, N, D), shift and scale (B, D)."""
    return x * (1 + scale[:, None]) + shift[:, None]


def modulations(vectors: Tensor, count: int) -> tuple[Tensor, ...]:
    """Cut what a condition gives, (B, count·D), into the `count` shifts, scales and gates of a block, each (B, D).

    On a GPU they are float32, as the norms that they change: one cast for all, instead of one for each gradient.
    """
    return (vectors.float() if vectors.device.type == "cuda" else vectors).chunk(count, dim=-1)


class ScalarMLP(nn.Module):
    """Sinusoid of a scalar, Linear, SiLU, Linear. (B,) → (B, dim). Weights start as N(0, 0.02²), biases at zero."""

    def __init__(self, dim: int, frequencies: int = 256) -> None:
        super().__init__()
        self.sinusoid = SinusoidalEmbedding(frequencies)
        self.linear1, self.linear2 = nn.Linear(frequencies, dim), nn.Linear(dim, dim)

    def forward(self, value: Tensor) -> Tensor:
        return self.linear2(F.silu(self.linear1(self.sinusoid(value))))


class LabelTable(nn.Module):
    """A learned vector for each class and one for "no label". (B,) int64 in [0, num_classes] or None → (B, dim)."""

    def __init__(self, num_classes: int, dim: int) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.weight = nn.Parameter(torch.randn(num_classes + 1, dim) * 0.02)

    def forward(self, label: Tensor | None, batch: int) -> Tensor:
        if label is None:
            label = torch.full((batch,), self.num_classes, device=self.weight.device)
        return F.embedding(label, self.weight)


def xavier(module: nn.Module) -> None:
    """Xavier-uniform weights and zero biases for a Linear, or for a Conv2d seen as one on patches (`apply` this)."""
    if isinstance(module, nn.Linear | nn.Conv2d):
        nn.init.xavier_uniform_(module.weight.flatten(1))
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def start_adaln_zero(model: nn.Module, embed_noise: ScalarMLP) -> None:
    """DiT's start: Xavier everywhere, N(0, 0.02²) for the noise-level MLP, zero for `modulation` layers and `head`."""
    model.apply(xavier)
    for layer in (embed_noise.linear1, embed_noise.linear2):
        nn.init.normal_(layer.weight, std=0.02)
    for name, module in model.named_modules():
        if name.rpartition(".")[2] in ("modulation", "head") and isinstance(module, nn.Linear):
            zero_(module)


def zero_(layer: nn.Linear | nn.Conv2d) -> None:
    """Set a layer's weight and bias to zero."""
    nn.init.zeros_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)


def rotary_angles(
    height: int,
    width: int,
    dim: int,
    native: tuple[int, int],
    theta: float = 1e4,
    device: torch.device | None = None,
) -> Tensor:
    """Angles of axial rotary positions, (h·w, dim/2): half of them turn with the row, half with the column.

    dim is the width of a head, divisible by 4. Frequencies fall geometrically from 1 to 1/theta per patch of the
    native (rows, columns); another grid is stretched over the same coordinates.
    """
    frequencies = theta ** -(torch.arange(0, dim // 2, 2, dtype=torch.float32, device=device) / (dim // 2))
    rows, columns = (
        (torch.arange(n, dtype=torch.float32, device=device) * (full / n))[:, None] * frequencies
        for n, full in zip((height, width), native, strict=True)
    )
    angles = [rows[:, None].expand(-1, width, -1), columns.expand(height, -1, -1)]
    return torch.cat(angles, dim=-1).flatten(0, 1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate neighbouring pairs of channels. x (..., N, d); cos, sin (N, d/2), or anything that broadcasts so."""
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([even * cos - odd * sin, odd * cos + even * sin], dim=-1).flatten(-2).to(x.dtype)


def rms_normalise(x: Tensor, weight: Tensor | None = None, eps: float = 1e-6) -> Tensor:
    """x / RMS over the last axis, times `weight`. Computed in float32, returned in the precision of x."""
    wide = x.float()
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (wide if weight is None else wide * weight).to(x.dtype)


def truncated_normal_(weight: Tensor, std: float = 0.02) -> None:
    """Normal of that deviation before everything beyond two of them is drawn again, as Keras has it."""
    nn.init.trunc_normal_(weight, std=std, a=-2 * std, b=2 * std)
