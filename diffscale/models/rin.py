"""RIN: recurrent interface networks (Jabri, Fleet & Chen 2023, arXiv 2212.11972), after the authors' released code.

Many interface tokens (patches) and few latents. A block reads from the interface into the latents by cross-attention,
works on the latents by self-attention, and writes back. The latents of an earlier pass can warm-start the next one
(latent self-conditioning), which at initialisation changes nothing.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffscale.core.errors import SettingError
from diffscale.core.ranges import Depth, DepthOrZero, DropRate, Size, SizeOrZero
from diffscale.models.layers import (
    Backbone,
    GroupNorm,
    SinusoidalEmbedding,
    multi_head_attention,
    noise_condition,
    one_hot_or_null,
    pad_to_multiple,
    to_image,
    to_tokens,
    without_autocast,
)
from diffscale.models.transformer_layers import (
    fixed_positions,
    head_width,
    modulate,
    patch_side,
    resize_positions,
    rms_normalise,
    sincos_positions,
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


class QKNorm(nn.Module):
    """Queries and keys with a root mean square of 1 in each head, times a learned gain (Dehghani et al. 2023).

    Without it the keys of the reads, made of tiles that no layer normalises, grow until a latent reads one tile.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_gain = nn.Parameter(torch.ones(width // heads))
        self.k_gain = nn.Parameter(torch.ones(width // heads))

    def forward(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """q (B, N, width), k (B, M, width) → the same."""
        q, k = (x.unflatten(-1, (self.heads, -1)) for x in (q, k))
        return rms_normalise(q, self.q_gain).flatten(-2), rms_normalise(k, self.k_gain).flatten(-2)


class CrossAttention(nn.Module):
    """Tokens x gather from tokens y; only x is normalised. Then an MLP, unless its ratio is 0.

    x (B, N, width), y (B, M, source) → (B, N, width). The attention is as wide as the narrower of the two.
    gated: each x scales what it gathered, by 2·sigmoid of a linear function of itself, which starts at one.
    """

    def __init__(
        self,
        width: int,
        source: int,
        heads: int,
        mlp_ratio: int,
        *,
        setting: str = "rw_heads",
        gated: bool = False,
        qk_norm: bool = False,
    ) -> None:
        super().__init__()
        inner = min(width, source)
        head_width(setting, heads, inner)
        self.heads = heads
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.q, self.kv = nn.Linear(width, inner), nn.Linear(source, 2 * inner)
        self.out = nn.Linear(inner, width)
        self.qk_norm = QKNorm(inner, heads) if qk_norm else None
        self.gate = nn.Linear(width, width) if gated else None
        self.mlp = FeedForward(width, mlp_ratio) if mlp_ratio else nn.Identity()

    def forward(
        self, x: Tensor, y: Tensor, x_positions: Tensor | None = None, y_positions: Tensor | None = None
    ) -> Tensor:
        """Positions, (N, width) and (M, source), join the queries and the keys, not the values."""
        normed = self.norm(x)
        k, v = self.kv(y).chunk(2, dim=-1)
        if y_positions is not None:
            k = k + F.linear(y_positions, self.kv.weight[: k.shape[-1]])
        q = self.q(normed if x_positions is None else normed + x_positions)
        if self.qk_norm is not None:
            q, k = self.qk_norm(q, k)
        gathered = self.out(multi_head_attention(q, k, v, self.heads))
        if self.gate is not None:
            gathered = gathered * (2 * torch.sigmoid(self.gate(normed)))
        return self.mlp(x + gathered)


class SelfAttention(nn.Module):
    """Pre-norm transformer layer on the latents. (B, M, D) → (B, M, D)."""

    def __init__(
        self, width: int, heads: int, mlp_ratio: int, dropout: float, drop_path: float, qk_norm: bool = False
    ) -> None:
        super().__init__()
        self.heads = heads
        self.qk_norm = QKNorm(width, heads) if qk_norm else None
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        from timm.layers import DropPath  # import cost: 2 s

        self.drop_path = DropPath(drop_path)
        self.mlp = FeedForward(width, mlp_ratio, dropout, drop_path)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).chunk(3, dim=-1)
        if self.qk_norm is not None:
            q, k = self.qk_norm(q, k)
        x = x + self.drop_path(self.out(multi_head_attention(q, k, v, self.heads)))
        return self.mlp(x)


class TileConv(nn.Module):
    """x + pointwise(SiLU(norm(depthwise(x)))) on the grid of tokens, as the authors' DepthwiseConvBlock.

    (B, N, D) → the same. It starts as nothing. Its kernel is the only way past the latents from tile to tile.
    """

    def __init__(self, width: int, kernel: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(width, width, kernel, padding=kernel // 2, groups=width)
        self.norm = GroupNorm(width)
        self.pointwise = nn.Linear(width, width)

    def forward(self, x: Tensor, height: int, width: int) -> Tensor:
        mixed = F.silu(self.norm(self.depthwise(to_image(x, height, width))))
        return x + self.pointwise(to_tokens(mixed))


class RINBlock(nn.Module):
    """Read, self-attention layers, write, perhaps a convolution of the tiles. (latents, interface) → the same two."""

    def __init__(
        self, read: CrossAttention, process: list[SelfAttention], write: CrossAttention, conv: TileConv | None
    ) -> None:
        super().__init__()
        self.read, self.process, self.write, self.conv = read, nn.ModuleList(process), write, conv

    def start_at_zero(self, writes: bool) -> None:
        """Set to zero what makes gates one and convolutions nothing, and if so wished what is written."""
        if self.write.gate is not None:
            zero_(self.write.gate)
        if self.conv is not None:
            zero_(self.conv.pointwise)
        if writes:
            zero_(self.write.out)
            if isinstance(self.write.mlp, FeedForward):
                zero_(self.write.mlp.mlp.fc2)

    def forward(
        self, latents: Tensor, interface: Tensor, positions: Tensor | None, grid: tuple[int, int]
    ) -> tuple[Tensor, Tensor]:
        """positions: (N, width), for the keys of the read and the queries of the write; grid: height and width of N."""
        latents = self.read(latents, interface, y_positions=positions)
        for layer in self.process:
            latents = layer(latents)
        interface = self.write(interface, latents, x_positions=positions)
        return latents, interface if self.conv is None else self.conv(interface, *grid)


class RIN(Backbone):
    """forward(x_in (B, C, H, W), logsnr (B,), label | None, state | None) → (prediction (B, C, H, W), state | None).

    The state is the latents after the last block, (B, latents, latent_width): give it to the next sampling step, or to
    the second pass of a training step; zeros and None mean that there is none. As initialised it has no effect.

    Without self-conditioning the network carries no state and returns None.

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
        write_heads: SizeOrZero = 0,  # attention heads of writes; 0: rw_heads
        dropout: DropRate = 0.0,  # dropout in the MLPs of the self-attention layers; the authors' CIFAR-10 has 0.1
        drop_path: DropRate = 0.0,  # probability of skipping a self-attention layer's branch; likewise 0.1
        zero_output: bool = False,  # the output starts at zero, as other backbones' do; the authors' does not
        self_conditioning: bool = True,  # the state has an effect; False drops its parameters and the extra pass
        start: Literal["small_time", "authors"] = "small_time",  # weights of stem and time MLP: see `initialise`
        zero_writes: bool = False,  # writes and the MLPs after them start at zero: the tiles pass unchanged
        gated_writes: bool = False,  # a tile scales what is written to it, by a gate of its own
        rw_positions: bool = False,  # fixed positions join the keys of the reads and the queries of the writes
        time_on_tiles: bool = False,  # time scales and shifts the tiles after the stem and before the output too
        qk_norm: bool = False,  # queries and keys of all attention are normalised in each head
        tile_conv: SizeOrZero = 0,  # side of a depthwise convolution of the tiles after a write (an option of theirs)
        late_latents: SizeOrZero = 0,  # further latents that join before the last block
    ) -> None:
        super().__init__()
        self.patch = patch_side("patch_size", patch_size or max(resolution // 32, min(2, resolution)), resolution)
        taken = 2 if num_classes else 1
        if latents <= taken:
            raise SettingError("latents", latents, f"more than the {taken} that time and class take")
        if latent_width % 8:
            raise SettingError("latent_width", latent_width, "a multiple of 8")
        head_width("latent_heads", latent_heads, latent_width)
        if tile_conv and tile_conv % 2 == 0:
            raise SettingError("tile_conv", tile_conv, "an odd number, or 0")
        if rw_positions and interface_width % 4:
            raise SettingError("interface_width", interface_width, "a multiple of 4 for rw_positions")
        self.carries_state = self_conditioning
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
        self.late_latents = nn.Parameter(torch.empty(late_latents, latent_width)) if late_latents else None
        self.modulate_tiles = nn.Linear(latent_width, 4 * interface_width) if time_on_tiles else None
        self.rw_positions: Tensor | None
        fixed = sincos_positions(side, side, interface_width, self.native) if rw_positions else None
        self.register_buffer("rw_positions", fixed, persistent=False)
        self.blocks = nn.ModuleList(
            RINBlock(
                CrossAttention(latent_width, interface_width, rw_heads, latent_mlp_ratio, qk_norm=qk_norm),
                [
                    SelfAttention(latent_width, latent_heads, latent_mlp_ratio, dropout, drop_path, qk_norm)
                    for _ in range(layers)
                ],
                CrossAttention(
                    interface_width,
                    latent_width,
                    write_heads or rw_heads,
                    interface_mlp_ratio,
                    setting="write_heads" if write_heads else "rw_heads",
                    gated=gated_writes,
                    qk_norm=qk_norm,
                ),
                TileConv(interface_width, tile_conv) if tile_conv else None,
            )
            for _ in range(num_blocks)
        )
        self.out_norm = nn.LayerNorm(interface_width, eps=1e-6)
        self.head = nn.Linear(interface_width, self.patch**2 * channels)
        self.initialise(start, zero_output, zero_writes)

    @torch.no_grad()
    def initialise(self, start: Literal["small_time", "authors"], zero_output: bool, zero_writes: bool) -> None:
        """The authors' (Keras's) start: smaller projections around attention, everything else Xavier-uniform.

        Keras takes the fans of a projection to or from heads (width, heads, head) as heads·width and head·width.
        start: `authors` has the stem's fans as those of a convolution, (p²·channels, p²·width), and Xavier-uniform
            weights in the time MLP (google-research/pix2seq, tape.py and transunet.py). `small_time` is what runs had
            before: a stem 2 to 7 times larger, a time token 6 to 22 times smaller.
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
        tables: list[Tensor] = [self.positions, self.latents]
        if self.late_latents is not None:
            tables.append(self.late_latents)
        if start == "authors":
            nn.init.xavier_uniform_(self.stem.weight)
        else:
            tables += [self.time1.weight, self.time2.weight]
        for weight in tables:
            truncated_normal_(weight, std=0.02)
        if self.carry_norm is not None:
            nn.init.zeros_(self.carry_norm.weight)
        if self.modulate_tiles is not None:
            zero_(self.modulate_tiles)
        for block in self.modules():
            if isinstance(block, RINBlock):
                block.start_at_zero(zero_writes)
        if zero_output:
            zero_(self.head)

    def embed_time(self, logsnr: Tensor) -> Tensor:
        """Standardised sinusoid of 1000·gamma, two layers, in float32. (B,) → (B, latent_width)."""
        with without_autocast(logsnr.device):
            wave = self.sinusoid(noise_condition(logsnr, "gamma"))
            wave = (wave - wave.mean(1, keepdim=True)) / wave.std(1, correction=0, keepdim=True)
            return self.time2(F.silu(self.time1(wave)))

    def initial_latents(self, time: Tensor, label: Tensor | None, state: Tensor | None) -> Tensor:
        """Learned latents, time token, class token, plus what an earlier pass left. time (B, D) → (B, M, D).

        The class is embedded in float32. The carried latents pass an MLP that autocast may compute in bf16: it is
        as wide as those of the blocks, a quarter of the network's cost in float32.
        """
        batch = len(time)
        tokens = [self.latents.expand(batch, -1, -1), time[:, None]]
        if self.embed_label is not None:
            with without_autocast(time.device):
                one_hot = one_hot_or_null(label, self.num_classes, batch, time.device)
                tokens.append(self.embed_label(one_hot)[:, None])
        latents = torch.cat(tokens, dim=1)
        if self.carry is not None and self.carry_norm is not None:
            earlier = torch.zeros_like(latents) if state is None else state.float()
            latents = latents + self.carry_norm(self.carry(earlier))
        return latents

    def forward(
        self, x_in: Tensor, logsnr: Tensor, label: Tensor | None = None, state: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        height, width = x_in.shape[2:]
        time = self.embed_time(logsnr)
        latents = self.initial_latents(time, label, state)
        patches = self.stem(pad_to_multiple(x_in, self.patch))
        grid = patches.shape[2], patches.shape[3]
        interface = self.stem_norm(to_tokens(patches))
        shifts = None if self.modulate_tiles is None else self.modulate_tiles(F.silu(time)).chunk(4, dim=1)
        if shifts is not None:
            interface = modulate(interface, *shifts[:2])
        interface = interface + resize_positions(self.positions, self.native, *grid)
        positions = None if self.rw_positions is None else fixed_positions(self.rw_positions, self.native, *grid)
        count = latents.shape[1]
        for i, block in enumerate(self.blocks):
            if self.late_latents is not None and i == len(self.blocks) - 1:
                latents = torch.cat([latents, self.late_latents.expand(len(x_in), -1, -1).to(latents.dtype)], dim=1)
            latents, interface = self.run_block(block, latents, interface, positions, grid)
        tiles = self.out_norm(interface)
        if shifts is not None:
            tiles = modulate(tiles, *shifts[2:])
        out = unpatchify(self.head(tiles), *grid, self.patch)
        return out[:, :, :height, :width].to(x_in.dtype), latents[:, :count] if self.carries_state else None

    def blocks_for_fsdp(self) -> list[nn.Module]:
        return list(self.blocks)

    def no_weight_decay(self) -> set[str]:
        return {"positions", "latents", "late_latents"} & {name for name, _ in self.named_parameters()}
