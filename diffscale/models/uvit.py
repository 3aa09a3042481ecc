"""UViT of simple diffusion (Hoogeboom et al. 2023, arXiv 2301.11093) and the residual form of SiD2 (arXiv 2410.19324).

Not the "U-ViT" of Bao et al. (arXiv 2209.12152), which is another network. A wavelet transform folds pixels into
channels, convolutional levels work at high resolution, one large transformer works at the lowest, and the inverse
transform unfolds the output.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffscale.core.errors import SettingError
from diffscale.core.ranges import Depth, DepthOrZero, DropRate, Factor, Size, SizeOrZero
from diffscale.models.layers import (
    Backbone,
    GroupNorm,
    LabelEmbedding,
    NoiseInput,
    multi_head_attention,
    noise_condition,
    pad_to_multiple,
    scale_and_shift,
    to_image,
    to_tokens,
    without_autocast,
)
from diffscale.models.transformer_layers import (
    ScalarMLP,
    head_width,
    hidden_width,
    modulate,
    modulations,
    resize_positions,
    rms_normalise,
    truncated_normal_,
    xavier,
    zero_,
)
from diffscale.models.wavelet import dwt, idwt


class ConvBlock(nn.Module):
    """norm, silu, conv, norm, scale and shift by the embedding, silu, dropout, conv; plus a shortcut.

    (B, channels_in, H, W), (B, E) → (B, channels, H, W). The second convolution starts at zero.
    """

    def __init__(self, channels_in: int, channels: int, embedding: int, dropout: float) -> None:
        super().__init__()
        self.norm1, self.norm2 = GroupNorm(channels_in), GroupNorm(channels)
        self.conv1 = nn.Conv2d(channels_in, channels, 3, padding=1)
        self.modulation = nn.Linear(embedding, 2 * channels)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        self.shortcut = nn.Identity() if channels_in == channels else nn.Conv2d(channels_in, channels, 1)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        shift, scale = self.modulation(embedding).chunk(2, dim=1)
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(self.dropout(F.silu(scale_and_shift(self.norm2(h), scale, shift))))
        return self.shortcut(x) + h


class TransformerBlock(nn.Module):
    """Pre-norm attention with normalised queries and keys, then an MLP; the embedding scales and shifts both norms.

    (B, N, D), (B, E) → (B, N, D). Both output projections start at zero.
    """

    def __init__(self, width: int, heads: int, mlp_ratio: float, embedding: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.modulation = nn.Linear(embedding, 4 * width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.q_gain, self.k_gain = nn.Parameter(torch.ones(width // heads)), nn.Parameter(torch.ones(width // heads))
        self.dropout = nn.Dropout(dropout)
        from timm.layers import GELUTanh, Mlp  # import cost: 2 s

        self.mlp = Mlp(width, hidden_width(width, mlp_ratio), act_layer=GELUTanh, drop=dropout)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        shift1, scale1, shift2, scale2 = modulations(self.modulation(embedding), 4)
        h = modulate(F.layer_norm(x, x.shape[-1:], eps=1e-6), shift1, scale1)
        q, k, v = self.qkv(h).chunk(3, dim=-1)
        q = rms_normalise(q.unflatten(-1, (self.heads, -1)), self.q_gain).flatten(2)
        k = rms_normalise(k.unflatten(-1, (self.heads, -1)), self.k_gain).flatten(2)
        x = x + self.dropout(self.out(multi_head_attention(q, k, v, self.heads)))
        h = modulate(F.layer_norm(x, x.shape[-1:], eps=1e-6), shift2, scale2)
        return x + self.mlp(h)


class Level(nn.Module):
    """One convolutional level: blocks on the way down, blocks on the way up, and the change to the next level's width.

    Down is a 2 × 2 mean and a 1 × 1 convolution; up is a 1 × 1 convolution and nearest neighbours.
    """

    def __init__(self, channels: int, below: int, blocks: int, embedding: int, dropout: float, residual: bool) -> None:
        super().__init__()
        joined = channels if residual else 2 * channels
        self.down = nn.ModuleList(ConvBlock(channels, channels, embedding, dropout) for _ in range(blocks))
        self.up = nn.ModuleList(ConvBlock(joined, channels, embedding, dropout) for _ in range(blocks))
        self.narrow, self.widen = nn.Conv2d(channels, below, 1), nn.Conv2d(below, channels, 1)

    def lower(self, x: Tensor) -> Tensor:
        """(B, channels, H, W) → (B, below, H/2, W/2)."""
        return self.narrow(F.avg_pool2d(x, 2))

    def raise_(self, x: Tensor) -> Tensor:
        """(B, below, H/2, W/2) → (B, channels, H, W)."""
        return F.interpolate(self.widen(x), scale_factor=2, mode="nearest")


class UViT(Backbone):
    """forward(x_in (B, C, H, W), logsnr (B,), label (B,) int64 | None, state) → (prediction (B, C, H, W), None).

    Any H and W: the input is padded inside to a multiple of 2^(patch_levels + conv levels) and the output cropped; the
    learned positions are interpolated for a grid other than the native one. The label `num_classes` and label=None
    mean "no label". As initialised the output is exactly zero.
    """

    def __init__(
        self,
        resolution: int,
        channels: int = 3,
        num_classes: int = 0,
        *,
        patching: Literal["haar", "5/3", "conv"] = "haar",  # wavelet, or the paper's slightly worse strided convolution
        patch_levels: DepthOrZero = 1,  # foldings of 2 × 2 pixels into channels before the first level; 0: none
        conv_widths: tuple[Size, ...] = (128,),  # width of each convolutional level, finest first
        conv_blocks: DepthOrZero = 2,  # blocks per level on the way down, and again on the way up
        width: Size = 512,  # width of the transformer
        depth: Depth = 8,  # transformer blocks
        num_heads: Size = 8,  # attention heads of the transformer, a divisor of its width
        mlp_ratio: Factor = 4.0,  # hidden width of the MLP over the width
        skips: Literal["block", "residual"] = "block",  # one per block, joined (UViT), or one per level, added (SiD2)
        dropout: DropRate = 0.0,  # dropout in the transformer, and in levels with a side of at most dropout_side
        dropout_side: SizeOrZero = 16,  # side in pixels; the paper drops nothing at high resolution
        embedding_width: Size = 512,  # width of the noise-level and label embedding
        noise_input: NoiseInput = "angle",  # number that is embedded, see layers.noise_condition
    ) -> None:
        super().__init__()
        if patch_levels < 0 or patching not in ("haar", "5/3", "conv"):
            raise ValueError(f"patching = {patching!r}, patch_levels = {patch_levels}: expected haar, 5/3 or conv, ≥ 0")
        head_width("num_heads", num_heads, width)
        self.multiple = 2 ** (patch_levels + len(conv_widths))
        if self.multiple > resolution:
            most = f"at most {resolution.bit_length() - 1} levels with patch_levels, here {patch_levels},"
            raise SettingError("conv_widths", conv_widths, f"{most} at a resolution of {resolution}")
        self.patching: Literal["haar", "5/3", "conv"] = patching
        self.patch_levels, self.residual = patch_levels, skips == "residual"
        self.noise_input = noise_input
        side = -(-resolution // self.multiple)
        self.native = (side, side)

        self.embed_noise = ScalarMLP(embedding_width)
        self.num_classes = num_classes
        self.embed_label = LabelEmbedding(num_classes, embedding_width) if num_classes else None
        widths = [*conv_widths, width]
        fold = 2**patch_levels
        self.conv_in: nn.Conv2d = (
            nn.Conv2d(channels, widths[0], fold, stride=fold)
            if patching == "conv" and patch_levels
            else nn.Conv2d(channels * fold**2, widths[0], 3, padding=1)
        )
        sides = [resolution / fold / 2**index for index in range(len(conv_widths))]
        self.levels = nn.ModuleList(
            Level(c, below, conv_blocks, embedding_width, dropout if s <= dropout_side else 0.0, self.residual)
            for c, below, s in zip(conv_widths, widths[1:], sides, strict=True)
        )
        self.positions = nn.Parameter(torch.empty(side * side, width))
        self.blocks = nn.ModuleList(
            TransformerBlock(width, num_heads, mlp_ratio, embedding_width, dropout) for _ in range(depth)
        )
        self.out_norm = GroupNorm(widths[0])
        self.conv_out = nn.Conv2d(widths[0], channels * fold**2, 3, padding=1)
        self.initialise()

    @torch.no_grad()
    def initialise(self) -> None:
        """Xavier; zero for the last layer of every branch, for the modulations' effect on it, and for the output."""
        self.apply(xavier)
        truncated_normal_(self.positions, std=0.02)
        for module in self.modules():
            if isinstance(module, ConvBlock):
                zero_(module.conv2)
            if isinstance(module, TransformerBlock):
                zero_(module.out)
                zero_(module.mlp.fc2)
        zero_(self.conv_out)

    def embed(self, logsnr: Tensor, label: Tensor | None) -> Tensor:
        """(B,) log SNR and labels → (B, E), the vector that every block gets; always in float32."""
        vector = self.embed_noise(noise_condition(logsnr, self.noise_input))
        if self.embed_label is not None:
            vector = vector + self.embed_label(label, len(logsnr))
        return F.silu(vector)

    def transform(self, x: Tensor, embedding: Tensor) -> Tensor:
        """The transformer on the coarsest grid. (B, D, h, w) → the same."""
        grid = x.shape[2], x.shape[3]
        tokens = to_tokens(x) + resize_positions(self.positions, self.native, *grid)
        for block in self.blocks:
            tokens = self.run_block(block, tokens, embedding)
        return to_image(tokens, *grid)

    def descend(self, x: Tensor, embedding: Tensor, index: int) -> Tensor:
        """Level `index` and everything below it, down and up again. Same shape in and out."""
        if index == len(self.levels):
            return self.transform(x, embedding)
        level = self.levels[index]
        assert isinstance(level, Level)
        kept = []
        for block in level.down:
            x = self.run_block(block, x, embedding)
            kept.append(x)
        low = level.lower(x)
        below = self.descend(low, embedding, index + 1)
        x = level.raise_(below - low) + x if self.residual else level.raise_(below)
        for block in level.up:
            joined = x if self.residual else torch.cat([x, kept.pop()], dim=1)
            x = self.run_block(block, joined, embedding)
        return x

    def head(self, x: Tensor) -> Tensor:
        """norm, silu, 3 × 3 convolution to the folded pixels. (B, D, h, w) → (B, C·4^patch_levels, h, w)."""
        return self.conv_out(F.silu(self.out_norm(x)))

    def forward(
        self, x_in: Tensor, logsnr: Tensor, label: Tensor | None = None, state: Tensor | None = None
    ) -> tuple[Tensor, None]:
        height, width = x_in.shape[2:]
        with without_autocast(x_in.device):
            embedding = self.embed(logsnr, label)
        x = pad_to_multiple(x_in, self.multiple)
        x = x if self.patching == "conv" else dwt(x, self.patching, self.patch_levels)
        x = self.descend(self.conv_in(x), embedding, 0)
        x = self.head(x)
        if self.patching == "conv":
            x = F.pixel_shuffle(x, 2**self.patch_levels)
        else:
            x = idwt(x, self.patching, self.patch_levels)
        return x[:, :, :height, :width].to(x_in.dtype), None

    def blocks_for_fsdp(self) -> list[nn.Module]:
        levels = [level for level in self.levels if isinstance(level, Level)]
        down = [block for level in levels for block in level.down]
        return [*down, *self.blocks, *(block for level in reversed(levels) for block in level.up)]

    def no_weight_decay(self) -> set[str]:
        return {"positions"} | ({"embed_label.weight"} if self.embed_label is not None else set())
