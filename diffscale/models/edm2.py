"""EDM2's UNet, in which every layer preserves the magnitude of its input in expectation (Karras et al. 2024).

Equation numbers are the paper's ("Analyzing and Improving the Training Dynamics of Diffusion Models"). No biases, no
norms: weights are kept at unit norm instead, so the published learning rates need `project_weights`, which a training
forward pass does by itself.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffscale.core.errors import SettingError
from diffscale.core.ranges import Depth, DropRate, NonNegative, Share, Size, SizeOrZero
from diffscale.kernels.attention import attend
from diffscale.models.layers import (
    Backbone,
    Resample,
    attention_at,
    check_levels,
    noise_condition,
    one_hot_or_null,
    pad_to_multiple,
    to_image,
    to_tokens,
    without_autocast,
)

_EPS = 1e-4


def rescale(x: Tensor, dim: int | tuple[int, ...]) -> Tensor:
    """x divided by its root mean square over `dim` (eq. 47's normalisation), with 1e-4 added to that root."""
    norm = torch.linalg.vector_norm(x, dim=dim, keepdim=True, dtype=torch.float32)
    scale = 1 / (_EPS + norm * math.sqrt(norm.numel() / x.numel()))
    return x * scale.to(x.dtype)


def mp_silu(x: Tensor) -> Tensor:
    """SiLU over 0.596, its root mean square on N(0, 1) (eq. 81)."""
    return F.silu(x) / 0.596


def mp_sum(a: Tensor, b: Tensor, weight: float) -> Tensor:
    """a and b blended, b's share being `weight`, at the magnitude of independent unit-variance inputs (eq. 88)."""
    norm = math.hypot(1 - weight, weight)
    return ((1 - weight) / norm) * a + (weight / norm) * b


def mp_concat(a: Tensor, b: Tensor, weight: float) -> Tensor:
    """a and b along the channels, scaled so that b contributes the share `weight` whatever their widths (eq. 103)."""
    na, nb = a.shape[1], b.shape[1]
    total = math.sqrt((na + nb) / ((1 - weight) ** 2 + weight**2))
    return torch.cat([a * (total * (1 - weight) / math.sqrt(na)), b * (total * weight / math.sqrt(nb))], dim=1)


class MPFourier(nn.Module):
    """√2·cos(2π(f·x + φ)) with fixed random f ~ N(0, bandwidth²) and φ ~ U(0, 1) (eq. 75). (B,) → (B, width)."""

    def __init__(self, width: int, bandwidth: float = 1.0) -> None:
        super().__init__()
        self.frequencies: Tensor
        self.phases: Tensor
        self.register_buffer("frequencies", 2 * math.pi * bandwidth * torch.randn(width))
        self.register_buffer("phases", 2 * math.pi * torch.rand(width))

    def forward(self, value: Tensor) -> Tensor:
        return math.sqrt(2) * torch.cos(value.float()[:, None] * self.frequencies + self.phases)


class MPWeight(nn.Module):
    """A linear or convolutional layer without bias whose filters have unit norm in effect (eqs. 47 and 66).

    kernel 0 is a linear layer on (B, Cin); 1 and 3 convolve (B, Cin, H, W) with zero padding.
    """

    def __init__(self, channels_in: int, channels_out: int, kernel: int = 0) -> None:
        super().__init__()
        shape = (channels_out, channels_in) + ((kernel, kernel) if kernel else ())
        self.padding = kernel // 2
        self.weight = nn.Parameter(torch.randn(shape))

    def normalised(self) -> Tensor:
        """The weight with each filter at root mean square 1, differentiable."""
        return rescale(self.weight.float(), tuple(range(1, self.weight.ndim)))

    def forward(self, x: Tensor, gain: Tensor | float = 1.0) -> Tensor:
        weight = self.scaled(gain).to(x.dtype)
        return F.linear(x, weight) if weight.ndim == 2 else F.conv2d(x, weight, padding=self.padding)

    def scaled(self, gain: Tensor | float) -> Tensor:
        """The weight that preserves magnitudes, times `gain` (eq. 47): unit-norm filters over √fan-in."""
        return self.normalised() * (gain / math.sqrt(self.weight[0].numel()))


class EDM2Block(nn.Module):
    """Residual block and optional attention (fig. 21). (B, Cin, H, W), (B, E) → (B, Cout, H', W').

    encoder: the shortcut comes first and its result is normalised over channels; decoder: the shortcut is last.
    """

    def __init__(
        self,
        channels_in: int,
        channels_out: int,
        embedding_width: int,
        *,
        encoder: bool,
        resample: Literal["keep", "down", "up"] = "keep",
        heads: int = 0,
        dropout: float = 0.0,
        residual_balance: float = 0.3,
        attention_balance: float = 0.3,
        clip: float = 256.0,
    ) -> None:
        super().__init__()
        if heads and channels_out % heads:
            raise SettingError("channels_per_head", channels_out // heads, f"a divisor of {channels_out} channels")
        self.encoder, self.heads, self.dropout = encoder, heads, dropout
        self.residual_balance, self.attention_balance, self.clip = residual_balance, attention_balance, clip
        self.resample = Resample(resample)
        self.embed_gain = nn.Parameter(torch.zeros(()))
        self.embed = MPWeight(embedding_width, channels_out)
        self.conv1 = MPWeight(channels_out if encoder else channels_in, channels_out, 3)
        self.conv2 = MPWeight(channels_out, channels_out, 3)
        self.shortcut = MPWeight(channels_in, channels_out, 1) if channels_in != channels_out else None
        self.qkv = MPWeight(channels_out, 3 * channels_out, 1) if heads else None
        self.out = MPWeight(channels_out, channels_out, 1) if heads else None

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        x = self.resample(x)
        if self.encoder:
            x = rescale(self.shortcut(x) if self.shortcut is not None else x, 1)
        h = self.conv1(mp_silu(x))
        modulation = self.embed(embedding, self.embed_gain) + 1
        h = mp_silu(h * modulation[:, :, None, None].to(h.dtype))
        h = self.conv2(F.dropout(h, self.dropout, self.training))
        if not self.encoder and self.shortcut is not None:
            x = self.shortcut(x)
        x = mp_sum(x, h, self.residual_balance)
        if self.qkv is not None and self.out is not None:
            x = mp_sum(x, self.out(self.attend(self.qkv(x))), self.attention_balance)
        return x.clamp(-self.clip, self.clip) if self.clip else x

    def attend(self, qkv: Tensor) -> Tensor:
        """Cosine attention: q, k and v are normalised per head. (B, 3C, H, W) → (B, C, H, W)."""
        heads = to_tokens(qkv).unflatten(-1, (3, self.heads, -1))
        q, k, v = rescale(heads, -1).permute(2, 0, 3, 1, 4)
        mixed = attend(q, k, v).transpose(1, 2).flatten(2)
        return to_image(mixed, *qkv.shape[2:])


class Uncertainty(nn.Module):
    """EDM2's learned uncertainty u(λ) of the loss (eq. 21). logsnr (B,) → (B,); used in training only."""

    def __init__(self, width: int = 128) -> None:
        super().__init__()
        self.fourier = MPFourier(width)
        self.linear = MPWeight(width, 1)

    def forward(self, logsnr: Tensor) -> Tensor:
        return self.linear(self.fourier(noise_condition(logsnr, "edm")))[:, 0]


class EDM2(Backbone):
    """The magnitude-preserving UNet, with `uncertainty`, a head for the loss weighting.

    forward(x_in (B, C, H, W), logsnr (B,), label (B,) int64 | None, state) → (prediction (B, C, H, W), None) for any H
    and W: the input is padded inside to a multiple of 2^(levels − 1) and the output cropped. x_in should have unit
    variance (c_in·z). The label `num_classes` and label=None mean "no label". As initialised the output is exactly zero
    and no block looks at the embedding: one gain each starts at zero.

    In training mode each forward pass first rescales the weights in place (eq. 66), once for all layers. Where the
    parameters are sharded (FSDP2), call `project_weights` before each step: there a forward pass sees copies.
    """

    def __init__(
        self,
        resolution: int,
        channels: int = 3,
        num_classes: int = 0,
        *,
        model_channels: Size = 192,  # width of the first level; channel_mult multiplies it
        channel_mult: tuple[Size, ...] = (1, 2, 3, 4),  # width per level in model_channels, finest first
        num_blocks: Depth = 3,  # residual blocks per level; the decoder has one more
        attn_resolutions: tuple[Size, ...] = (16, 8),  # sides with attention; the nearest level at or below each
        channels_per_head: Size = 64,  # width of an attention head
        dropout: DropRate = 0.0,  # dropout before the second convolution of a block
        label_balance: Share = 0.5,  # share of the class in the embedding
        concat_balance: Share = 0.5,  # share of the skip connection in the decoder's input
        residual_balance: Share = 0.3,  # share of the residual branch
        attention_balance: Share = 0.3,  # share of the attention
        clip: NonNegative = 256.0,  # activations are clipped to ± this; 0: not clipped
        noise_mult: SizeOrZero = 0,  # width of the noise-level features, in model_channels; 0: as the first level
        embedding_mult: SizeOrZero = 0,  # width of the embedding, in model_channels; 0: as the widest level
    ) -> None:
        super().__init__()
        check_levels(resolution, channel_mult, num_blocks)
        self.num_classes, self.label_balance, self.concat_balance = num_classes, label_balance, concat_balance
        self.multiple = 2 ** (len(channel_mult) - 1)
        widths = [model_channels * m for m in channel_mult]
        noise_width = model_channels * noise_mult if noise_mult else widths[0]
        width = model_channels * embedding_mult if embedding_mult else max(widths)
        self.out_gain = nn.Parameter(torch.zeros(()))
        self.fourier = MPFourier(noise_width)
        self.embed_noise = MPWeight(noise_width, width)
        self.embed_label = MPWeight(num_classes, width) if num_classes else None
        self.uncertainty = Uncertainty()

        def block(c: int, out: int, encoder: bool, mode: Literal["keep", "down", "up"] = "keep", heads: int = 0):
            return EDM2Block(
                c,
                out,
                width,
                encoder=encoder,
                resample=mode,
                heads=heads,
                dropout=dropout,
                residual_balance=residual_balance,
                attention_balance=attention_balance,
                clip=clip,
            )

        def heads_of(out: int, level: int) -> int:
            attends = attention_at(level, resolution, attn_resolutions)
            return max(out // channels_per_head, 1) if attends else 0

        c = widths[0]
        self.conv_in = MPWeight(channels + 1, c, 3)  # the extra channel is constant 1, in place of biases
        self.encoder, self.decoder = nn.ModuleList(), nn.ModuleList()
        self.takes_skip: list[bool] = []
        skip_widths = [c]
        for level, out in enumerate(widths):
            if level:
                self.encoder.append(block(c, c, True, "down"))
                skip_widths.append(c)
            for _ in range(num_blocks):
                self.encoder.append(block(c, out, True, heads=heads_of(out, level)))
                skip_widths.append(out)
                c = out
        for level, out in reversed(list(enumerate(widths))):
            if level == len(widths) - 1:
                self.decoder.append(block(c, c, False, heads=max(c // channels_per_head, 1)))
                self.decoder.append(block(c, c, False))
                self.takes_skip += [False, False]
            else:
                self.decoder.append(block(c, c, False, "up"))
                self.takes_skip.append(False)
            for _ in range(num_blocks + 1):
                self.decoder.append(block(c + skip_widths.pop(), out, False, heads=heads_of(out, level)))
                self.takes_skip.append(True)
                c = out
        self.conv_out = MPWeight(c, channels, 3)

    def embed(self, logsnr: Tensor, label: Tensor | None) -> Tensor:
        """(B,) log SNR and labels → (B, width), the vector that every block gets; always in float32."""
        vector = self.embed_noise(self.fourier(noise_condition(logsnr, "edm")))
        if self.embed_label is not None:
            one_hot = one_hot_or_null(label, self.num_classes, len(logsnr), logsnr.device)
            vector = mp_sum(vector, self.embed_label(one_hot * math.sqrt(self.num_classes)), self.label_balance)
        return mp_silu(vector)

    def forward(
        self, x_in: Tensor, logsnr: Tensor, label: Tensor | None = None, state: Tensor | None = None
    ) -> tuple[Tensor, None]:
        if self.training:
            self.project_weights()
        height, width = x_in.shape[2:]
        with without_autocast(x_in.device):
            embedding = self.embed(logsnr, label)
        x = pad_to_multiple(torch.cat([x_in, torch.ones_like(x_in[:, :1])], dim=1), self.multiple)
        x = self.conv_in(x)
        kept = [x]
        for block in self.encoder:
            x = self.run_block(block, x, embedding)
            kept.append(x)
        for block, takes_skip in zip(self.decoder, self.takes_skip, strict=True):
            x = mp_concat(x, kept.pop(), self.concat_balance) if takes_skip else x
            x = self.run_block(block, x, embedding)
        return self.conv_out(x, self.out_gain)[:, :, :height, :width].to(x_in.dtype), None

    @torch.no_grad()
    def project_weights(self) -> None:
        """Rescale every filter in place to root mean square 1 (eq. 66)."""
        for module in self.modules():
            if isinstance(module, MPWeight):
                module.weight.data.copy_(module.normalised())  # .data: a second pass before backward is no error

    def blocks_for_fsdp(self) -> list[nn.Module]:
        return [*self.encoder, *self.decoder]

    def no_weight_decay(self) -> set[str]:
        return {name for name, _ in self.named_parameters()}
