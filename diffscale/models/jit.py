"""JiT: "just image transformers", large pixel patches and nothing else (Li & He 2025, arXiv 2511.13720).

Meant to predict the image itself (prediction "x0"): from large patches the noise and the velocity cannot be predicted,
for they fill the whole patch space, while images lie near a low-dimensional part of it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffscale.core.errors import SettingError
from diffscale.core.ranges import Depth, DepthOrZero, DropRate, Factor, Size, SizeOrZero
from diffscale.kernels.attention import attend
from diffscale.models.layers import Backbone, pad_to_multiple, to_tokens, without_autocast
from diffscale.models.transformer_layers import (
    LabelTable,
    ScalarMLP,
    fixed_positions,
    head_width,
    hidden_width,
    modulate,
    modulations,
    patch_side,
    rms_normalise,
    rotary_angles,
    rotate,
    sincos_positions,
    start_adaln_zero,
    unpatchify,
)


class JiTBlock(nn.Module):
    """Gated attention with rotary positions and normalised queries and keys, then a gated SwiGLU; RMS norms.

    dropout is that of the attention's output and of the SwiGLU's hidden values. The gates start at zero.
    """

    def __init__(self, width: int, heads: int, mlp_ratio: float, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        hidden = max(int(hidden_width(width, mlp_ratio) * 2 / 3), 1)
        self.gain1, self.gain2 = nn.Parameter(torch.ones(width)), nn.Parameter(torch.ones(width))
        self.q_gain, self.k_gain = nn.Parameter(torch.ones(width // heads)), nn.Parameter(torch.ones(width // heads))
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.gate_and_value, self.down = nn.Linear(width, 2 * hidden), nn.Linear(hidden, width)
        self.dropout = nn.Dropout(dropout)
        self.modulation = nn.Linear(width, 6 * width)

    def forward(self, x: Tensor, condition: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """x (B, N, D), condition (B, D), already through SiLU, cos and sin (N, D/heads/2) → (B, N, D)."""
        shift1, scale1, gate1, shift2, scale2, gate2 = modulations(self.modulation(condition), 6)
        h = modulate(rms_normalise(x, self.gain1), shift1, scale1)
        q, k, v = self.qkv(h).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        q = rotate(rms_normalise(q, self.q_gain), cos, sin)
        k = rotate(rms_normalise(k, self.k_gain), cos, sin)
        h = attend(q, k, v).transpose(1, 2).flatten(2)
        x = x + gate1[:, None] * self.dropout(self.out(h))
        h = modulate(rms_normalise(x, self.gain2), shift2, scale2)
        gate, value = self.gate_and_value(h).chunk(2, dim=-1)
        return x + gate2[:, None] * self.down(self.dropout(F.silu(gate) * value))


class RotaryTables(nn.Module):
    """Cosines and sines of the rotary positions of the patches, alone and behind context tokens, which do not turn.

    Those of the native grid are buffers (not in the state dict), so that a forward pass makes nothing on the host.
    """

    def __init__(self, native: tuple[int, int], head_width: int, context: int) -> None:
        super().__init__()
        self.native, self.head_width, self.context = native, head_width, context
        self.alone: Tensor
        self.joined: Tensor
        alone, joined = self.make(*native)
        self.register_buffer("alone", alone, persistent=False)
        self.register_buffer("joined", joined, persistent=False)

    def make(self, height: int, width: int, device: torch.device | None = None) -> tuple[Tensor, Tensor]:
        """Both tables of a grid of height × width patches, (2, h·w, d/2) and (2, context + h·w, d/2)."""
        angles = rotary_angles(height, width, self.head_width, self.native, device=device)
        both = angles, F.pad(angles, (0, 0, self.context, 0))
        alone, joined = (torch.stack([a.cos(), a.sin()]) for a in both)
        return alone, joined

    def forward(self, height: int, width: int) -> tuple[Tensor, Tensor]:
        """Both tables of a grid: (cosines, sines) of the patches alone and behind the context."""
        if (height, width) == self.native:
            return self.alone, self.joined
        return self.make(height, width, self.alone.device)


class JiT(Backbone):
    """forward(x_in (B, C, H, W), logsnr (B,), label (B,) int64 | None, state) → (prediction (B, C, H, W), None).

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
        patch_size: SizeOrZero = 0,  # side of a patch; 0: resolution / 16, so that there are 256
        bottleneck: Size = 128,  # width of the patch embedding's first layer; H 256
        width: Size = 768,  # width of the tokens: B 768, L 1024, H 1280
        depth: Depth = 12,  # blocks: B 12, L 24, H 32
        num_heads: Size = 12,  # attention heads, width / num_heads a multiple of 4: B 12, L and H 16
        mlp_ratio: Factor = 4.0,  # hidden width of an MLP with as many weights; the SwiGLU's is 2/3 of it
        dropout: DropRate = 0.0,  # dropout in the middle half of the blocks
        context_tokens: SizeOrZero = 32,  # class tokens that join the patches; without classes learned registers
        context_start: DepthOrZero = 4,  # block before which they join: B 4, L 8, H 10
    ) -> None:
        super().__init__()
        self.patch = patch_side("patch_size", patch_size or max(resolution // 16, 1), resolution)
        head = head_width("num_heads", num_heads, width, multiple=4)
        if not 0 <= context_start < depth:
            raise SettingError("context_start", context_start, f"0 to {depth - 1}, one of the blocks")
        side = -(-resolution // self.patch)
        self.native = (side, side)
        self.context_start = context_start
        self.embed_noise = ScalarMLP(width)
        self.num_classes = num_classes
        self.embed_label = LabelTable(num_classes, width) if num_classes else None
        self.embed_patches = nn.Conv2d(channels, bottleneck, self.patch, stride=self.patch, bias=False)
        self.widen = nn.Conv2d(bottleneck, width, 1)
        self.positions = nn.Parameter(sincos_positions(side, side, width, self.native), requires_grad=False)
        self.context = nn.Parameter(torch.randn(context_tokens, width) * 0.02) if context_tokens else None
        self.rotary = RotaryTables(self.native, head, context_tokens)
        middle = range(depth // 4, depth // 4 * 3)
        self.blocks = nn.ModuleList(
            JiTBlock(width, num_heads, mlp_ratio, dropout if index in middle else 0.0) for index in range(depth)
        )
        self.out_gain = nn.Parameter(torch.ones(width))
        self.modulation = nn.Linear(width, 2 * width)
        self.head = nn.Linear(width, self.patch**2 * channels)
        start_adaln_zero(self, self.embed_noise)

    def forward(
        self, x_in: Tensor, logsnr: Tensor, label: Tensor | None = None, state: Tensor | None = None
    ) -> tuple[Tensor, None]:
        height, width = x_in.shape[2:]
        batch = len(logsnr)
        with without_autocast(x_in.device):
            condition = self.embed_noise(torch.sigmoid(logsnr.float() / 2))  # its t: α of the linear interpolant
            context = None if self.context is None else self.context.expand(batch, -1, -1)
            if self.embed_label is not None:
                classes = self.embed_label(label, batch)
                condition = condition + classes
                context = None if context is None else context + classes[:, None]
            condition = F.silu(condition)
        patches = self.widen(self.embed_patches(pad_to_multiple(x_in, self.patch)))
        grid = patches.shape[2], patches.shape[3]
        x = to_tokens(patches) + fixed_positions(self.positions, self.native, *grid)
        turns, behind_context = self.rotary(*grid)
        for index, block in enumerate(self.blocks):
            if index == self.context_start and context is not None:
                x = torch.cat([context, x], dim=1)
                turns = behind_context
            x = self.run_block(block, x, condition, turns[0], turns[1])
        shift, scale = modulations(self.modulation(condition), 2)
        patches_only = x[:, -grid[0] * grid[1] :]
        x = modulate(rms_normalise(patches_only, self.out_gain), shift, scale)
        return unpatchify(self.head(x), *grid, self.patch)[:, :, :height, :width].to(x_in.dtype), None

    def blocks_for_fsdp(self) -> list[nn.Module]:
        return list(self.blocks)

    def no_weight_decay(self) -> set[str]:
        names = {"positions", "context", "embed_label.weight"}
        return names & {name for name, _ in self.named_parameters()}
