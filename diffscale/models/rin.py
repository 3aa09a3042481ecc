"""RIN: recurrent interface networks (Jabri, Fleet & Chen 2023, arXiv 2212.11972), after the authors' released code.

Many interface tokens (patches) and few latents. A block reads from the interface into the latents by cross-attention,
works on the latents by self-attention, and writes back. The latents of an earlier pass can warm-start the next one
(latent self-conditioning), which at initialisation changes nothing.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffscale.core.errors import SettingError
from diffscale.core.ranges import Depth, DepthOrZero, DropRate, Size, SizeOrZero
from diffscale.models.layers import (
    Backbone,
    SinusoidalEmbedding,
    multi_head_attention,
    noise_condition,
    one_hot_or_null,
    pad_to_multiple,
    to_tokens,
    without_autocast,
)
from diffscale.models.transformer_layers import (
    head_width,
    patch_side,
    resize_positions,
    truncated_normal_,
    unpatchify,
    xavier,
    zero_,
)


class FeedForward(nn.Module):
    """x + mlp(norm(x)), GELU. (B, N, D) → (B, N, D)."""

    def __init__(self, width: int, ratio: int, dropout: float = 0.0, drop_path: float = 0.0) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=1e-6)
        from timm.layers import DropPath, Mlp  # import cost: 2 s

        self.mlp = Mlp(width, width * ratio, drop=(dropout, 0.0))
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop_path(self.mlp(self.norm(x)))


class CrossAttention(nn.Module):
    """Tokens x gather from tokens y; only x is normalised. Then an MLP, unless its ratio is 0.

    x (B, N, width), y (B, M, source) → (B, N, width). The attention is as wide as the narrower of the two.
    """

    def __init__(self, width: int, source: int, heads: int, mlp_ratio: int) -> None:
        super().__init__()
        inner = min(width, source)
        head_width("rw_heads", heads, inner)
        self.heads = heads
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.q, self.kv = nn.Linear(width, inner), nn.Linear(source, 2 * inner)
        self.out = nn.Linear(inner, width)
        self.mlp = FeedForward(width, mlp_ratio) if mlp_ratio else nn.Identity()

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        k, v = self.kv(y).chunk(2, dim=-1)
        x = x + self.out(multi_head_attention(self.q(self.norm(x)), k, v, self.heads))
        return self.mlp(x)


class SelfAttention(nn.Module):
    """Pre-norm transformer layer on the latents. (B, M, D) → (B, M, D)."""

    def __init__(self, width: int, heads: int, mlp_ratio: int, dropout: float, drop_path: float) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        from timm.layers import DropPath  # import cost: 2 s

        self.drop_path = DropPath(drop_path)
        self.mlp = FeedForward(width, mlp_ratio, dropout, drop_path)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).chunk(3, dim=-1)
        x = x + self.drop_path(self.out(multi_head_attention(q, k, v, self.heads)))
        return self.mlp(x)


class RINBlock(nn.Module):
    """Read, `layers` times self-attention, write. (latents, interface) → (latents, interface)."""

    def __init__(self, read: CrossAttention, process: list[SelfAttention], write: CrossAttention) -> None:
        super().__init__()
        self.read, self.process, self.write = read, nn.ModuleList(process), write

    def forward(self, latents: Tensor, interface: Tensor) -> tuple[Tensor, Tensor]:
        latents = self.read(latents, interface)
        for layer in self.process:
            latents = layer(latents)
        return latents, self.write(interface, latents)


class RIN(Backbone):
    """forward(x_in (B, C, H, W), logsnr (B,), label | None, state | None) → (prediction (B, C, H, W), state).

    The state is the latents after the last block, (B, latents, latent_width): give it to the next sampling step, or to
    the second pass of a training step; zeros and None mean that there is none. As initialised it has no effect.

    The time token and, with classes, the class token take the place of one latent each. Any H and W: padded inside to
    whole patches and cropped; the learned positions are interpolated for a grid other than the native one.
    """

    carries_state = True

    def __init__(
        self,
        resolution: int,
        channels: int = 3,
        num_classes: int = 0,
        *,
        patch_size: SizeOrZero = 0,  # side of a patch; 0: resolution / 32, at least 2 (2 at 32, 4 at 128, 32 at 1024)
        interface_width: Size = 256,  # width of the interface tokens; ImageNet 512
        interface_mlp_ratio: DepthOrZero = 2,  # hidden over outer width of the MLP after a write, 0: none; ImageNet 4
        latents: Size = 128,  # number of latents, with the time and class tokens
        latent_width: Size = 512,  # width of the latents, a multiple of 8; ImageNet 768 and 1024
        latent_mlp_ratio: Depth = 4,  # hidden width of the MLPs on the latents over the width
        num_blocks: Depth = 3,  # read-process-write blocks, each with its own weights
        layers: DepthOrZero = 2,  # self-attention layers per block
        latent_heads: Size = 16,  # attention heads of the self-attention
        rw_heads: Size = 8,  # attention heads of reads and writes; ImageNet 16
        dropout: DropRate = 0.0,  # dropout in the MLPs of the self-attention layers; the authors' CIFAR-10 has 0.1
        drop_path: DropRate = 0.0,  # probability of skipping a self-attention layer's branch; likewise 0.1
        zero_output: bool = False,  # the output starts at zero, as other backbones' do; the authors' does not
        self_conditioning: bool = True,  # the state has an effect; False drops its parameters
    ) -> None:
        super().__init__()
        self.patch = patch_side("patch_size", patch_size or max(resolution // 32, min(2, resolution)), resolution)
        taken = 2 if num_classes else 1
        if latents <= taken:
            raise SettingError("latents", latents, f"more than the {taken} that time and class take")
        if latent_width % 8:
            raise SettingError("latent_width", latent_width, "a multiple of 8")
        head_width("latent_heads", latent_heads, latent_width)
        side = -(-resolution // self.patch)
        self.native, self.num_classes = (side, side), num_classes

        self.stem = nn.Conv2d(channels, interface_width, self.patch, stride=self.patch)
        self.stem_norm = nn.LayerNorm(interface_width, eps=1e-6)
        self.positions = nn.Parameter(torch.empty(side * side, interface_width))
        self.latents = nn.Parameter(torch.empty(latents - taken, latent_width))
        self.sinusoid = SinusoidalEmbedding(latent_width // 4)
        self.time1, self.time2 = nn.Linear(latent_width // 4, latent_width), nn.Linear(latent_width, latent_width)
        self.embed_label = nn.Linear(num_classes, latent_width) if num_classes else None
        self.carry = FeedForward(latent_width, latent_mlp_ratio) if self_conditioning else None
        self.carry_norm = nn.LayerNorm(latent_width, eps=1e-6) if self_conditioning else None
        self.blocks = nn.ModuleList(
            RINBlock(
                CrossAttention(latent_width, interface_width, rw_heads, latent_mlp_ratio),
                [
                    SelfAttention(latent_width, latent_heads, latent_mlp_ratio, dropout, drop_path)
                    for _ in range(layers)
                ],
                CrossAttention(interface_width, latent_width, rw_heads, interface_mlp_ratio),
            )
            for _ in range(num_blocks)
        )
        self.out_norm = nn.LayerNorm(interface_width, eps=1e-6)
        self.head = nn.Linear(interface_width, self.patch**2 * channels)
        self.initialise(zero_output)

    @torch.no_grad()
    def initialise(self, zero_output: bool) -> None:
        """The authors' (Keras's) start: smaller projections around attention, everything else Xavier-uniform.

        Keras takes the fans of a projection to or from heads (width, heads, head) as heads·width and head·width.
        """
        self.apply(xavier)
        for module in self.modules():
            if isinstance(module, CrossAttention | SelfAttention):
                inner = module.out.weight.shape[1]
                head = inner // module.heads
                into = (module.q, module.kv) if isinstance(module, CrossAttention) else (module.qkv,)
                for layer in into:
                    bound = math.sqrt(6 / (layer.weight.shape[1] * (module.heads + head)))
                    nn.init.uniform_(layer.weight, -bound, bound)
                bound = math.sqrt(6 / (module.heads * (head + module.out.weight.shape[0])))
                nn.init.uniform_(module.out.weight, -bound, bound)
        for weight in (self.positions, self.latents, self.time1.weight, self.time2.weight):
            truncated_normal_(weight, std=0.02)
        if self.carry_norm is not None:
            nn.init.zeros_(self.carry_norm.weight)
        if zero_output:
            zero_(self.head)

    def initial_latents(self, logsnr: Tensor, label: Tensor | None, state: Tensor | None) -> Tensor:
        """Learned latents, time token, class token, plus what an earlier pass left. (B,) → (B, M, D), float32.

        Time and class are embedded in float32. The carried latents pass an MLP that autocast may compute in bf16: it is
        as wide as those of the blocks, a quarter of the network's cost in float32.
        """
        batch = len(logsnr)
        with without_autocast(logsnr.device):
            wave = self.sinusoid(noise_condition(logsnr, "gamma"))
            wave = (wave - wave.mean(1, keepdim=True)) / wave.std(1, correction=0, keepdim=True)
            tokens = [self.latents.expand(batch, -1, -1), self.time2(F.silu(self.time1(wave)))[:, None]]
            if self.embed_label is not None:
                one_hot = one_hot_or_null(label, self.num_classes, batch, logsnr.device)
                tokens.append(self.embed_label(one_hot)[:, None])
            latents = torch.cat(tokens, dim=1)
        if self.carry is not None and self.carry_norm is not None:
            earlier = torch.zeros_like(latents) if state is None else state.float()
            latents = latents + self.carry_norm(self.carry(earlier))
        return latents

    def forward(
        self, x_in: Tensor, logsnr: Tensor, label: Tensor | None = None, state: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        height, width = x_in.shape[2:]
        latents = self.initial_latents(logsnr, label, state)
        patches = self.stem(pad_to_multiple(x_in, self.patch))
        grid = patches.shape[2], patches.shape[3]
        interface = self.stem_norm(to_tokens(patches)) + resize_positions(self.positions, self.native, *grid)
        for block in self.blocks:
            latents, interface = self.run_block(block, latents, interface)
        out = unpatchify(self.head(self.out_norm(interface)), *grid, self.patch)
        return out[:, :, :height, :width].to(x_in.dtype), latents

    def blocks_for_fsdp(self) -> list[nn.Module]:
        return list(self.blocks)

    def no_weight_decay(self) -> set[str]:
        return {"positions", "latents"}
