"""DiT: a plain vision transformer with adaLN-Zero conditioning (Peebles & Xie 2023, arXiv 2212.09748).

Patches of the image (or of latents) are tokens with fixed sine-cosine positions; each block's norms are shifted and
scaled, and its branches gated, by the noise level and the label. All gates start at zero, so a block starts as nothing.
"""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from diffscale.core.ranges import Depth, DropRate, Factor, Size, SizeOrZero
from diffscale.models.layers import (
    Backbone,
    NoiseInput,
    noise_condition,
    pad_to_multiple,
    self_attention,
    to_tokens,
    without_autocast,
)
from diffscale.models.transformer_layers import (
    LabelTable,
    ScalarMLP,
    fixed_positions,
    head_width,
    hidden_width,
    modulate,
    modulations,
    patch_side,
    resize_positions,
    sincos_positions,
    start_adaln_zero,
    unpatchify,
)


class DiTBlock(nn.Module):
    """x + gate·attention(norm(x)), then x + gate·mlp(norm(x)); the six vectors come from the condition."""

    def __init__(self, width: int, heads: int, mlp_ratio: float, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        from timm.layers import GELUTanh, Mlp  # import cost: 2 s

        self.mlp = Mlp(width, hidden_width(width, mlp_ratio), act_layer=GELUTanh, drop=(dropout, 0.0))
        self.modulation = nn.Linear(width, 6 * width)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """x (B, N, D), condition (B, D), already through SiLU → (B, N, D)."""
        shift1, scale1, gate1, shift2, scale2, gate2 = modulations(self.modulation(condition), 6)
        h = modulate(F.layer_norm(x, x.shape[-1:], eps=1e-6), shift1, scale1)
        x = x + gate1[:, None] * self.out(self_attention(self.qkv(h), self.heads))
        h = modulate(F.layer_norm(x, x.shape[-1:], eps=1e-6), shift2, scale2)
        return x + gate2[:, None] * self.mlp(h)


class DiT(Backbone):
    """forward(x_in (B, C, H, W), logsnr (B,), label (B,) int64 | None, state) → (prediction (B, out, H, W), None).

    Any H and W: the input is padded inside to whole patches and the output cropped; a grid other than the native one
    gets the positions of that stretched over it. The label `num_classes` and label=None mean "no label", which has its
    own vector. As initialised the output is exactly zero.
    """

    def __init__(
        self,
        resolution: int,
        channels: int = 3,
        num_classes: int = 0,
        *,
        patch_size: Size = 2,  # side of a patch in pixels; the published /2, /4, /8
        width: Size = 384,  # width of the tokens, a multiple of 4: S 384, B 768, L 1024, XL 1152
        depth: Depth = 12,  # blocks: S and B 12, L 24, XL 28
        num_heads: Size = 6,  # attention heads, a divisor of the width: S 6, B 12, L and XL 16
        mlp_ratio: Factor = 4.0,  # hidden width of the MLP over the width
        dropout: DropRate = 0.0,  # dropout in the MLP
        noise_input: NoiseInput = "ddpm",  # number that is embedded, see layers.noise_condition
        positions: Literal["fixed", "learned"] = "fixed",  # sine-cosine table of positions: frozen, or only its start
        out_channels: SizeOrZero = 0,  # output channels; 0: as the image; DiT published twice as many
    ) -> None:
        super().__init__()
        self.patch = patch_side("patch_size", patch_size, resolution)
        head_width("num_heads", num_heads, width)
        side = -(-resolution // patch_size)
        self.native = (side, side)
        self.noise_input = noise_input
        self.embed_patches = nn.Conv2d(channels, width, patch_size, stride=patch_size)
        self.learned_positions = positions == "learned"
        self.positions = nn.Parameter(sincos_positions(side, side, width, self.native), self.learned_positions)
        self.embed_noise = ScalarMLP(width)
        self.num_classes = num_classes
        self.embed_label = LabelTable(num_classes, width) if num_classes else None
        self.blocks = nn.ModuleList(DiTBlock(width, num_heads, mlp_ratio, dropout) for _ in range(depth))
        self.modulation = nn.Linear(width, 2 * width)
        self.head = nn.Linear(width, patch_size**2 * (out_channels or channels))
        start_adaln_zero(self, self.embed_noise)

    def grid_positions(self, height: int, width: int) -> Tensor:
        """(h·w, D) for a grid of h × w patches."""
        resized = resize_positions if self.learned_positions else fixed_positions
        return resized(self.positions, self.native, height, width)

    def forward(
        self, x_in: Tensor, logsnr: Tensor, label: Tensor | None = None, state: Tensor | None = None
    ) -> tuple[Tensor, None]:
        height, width = x_in.shape[2:]
        with without_autocast(x_in.device):
            condition = self.embed_noise(noise_condition(logsnr, self.noise_input))
            if self.embed_label is not None:
                condition = condition + self.embed_label(label, len(logsnr))
            condition = F.silu(condition)
        patches = self.embed_patches(pad_to_multiple(x_in, self.patch))
        grid = patches.shape[2], patches.shape[3]
        x = to_tokens(patches) + self.grid_positions(*grid)
        for block in self.blocks:
            x = self.run_block(block, x, condition)
        shift, scale = modulations(self.modulation(condition), 2)
        x = self.head(modulate(F.layer_norm(x, x.shape[-1:], eps=1e-6), shift, scale))
        return unpatchify(x, *grid, self.patch)[:, :, :height, :width].to(x_in.dtype), None

    def blocks_for_fsdp(self) -> list[nn.Module]:
        return list(self.blocks)

    def no_weight_decay(self) -> set[str]:
        return {"positions"} | ({"embed_label.weight"} if self.embed_label is not None else set())
