"""Layers that more than one backbone uses: noise-level and label embeddings, norms, resampling, attention.

Shapes: B batch, C channels, H × W image, N tokens, D width. The layers know nothing of schedules or losses; a model
gets the noise level as log SNR (λ = ln α²/σ²) and derives the number that its embedding expects (`noise_condition`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from diffscale.core.errors import SettingError
from diffscale.kernels.attention import HEAD_MULTIPLE, attend
from diffscale.models.step_numbers import cosine_betas, linear_betas, step_number

NoiseInput = Literal["edm", "ddpm", "angle", "gamma", "ddpm_index", "adm_index", "iddpm_index", "flow", "flow_1000"]

_BETA_MIN, _BETA_MAX = 0.1, 20.0  # DDPM's 1e-4 → 0.02 over 1000 steps, in continuous time


def noise_condition(logsnr: Tensor, kind: NoiseInput) -> Tensor:
    """Return the input of a noise-level embedding from log SNR. (B,) float32 → (B,) float32.

    edm: ln(σ)/4 with σ = e^(−λ/2) (Karras et al. 2022, table 1). ddpm: 1000·t of the linear-β process, inverted in
    closed form from ln ᾱ(t) = −½(β_max−β_min)t² − β_min·t (Song et al. 2021, eq. 33). angle: 1000·t of the cosine
    process, t = (2/π)·atan(e^(−λ/2)). gamma: 1000·sigmoid(λ), the signal fraction (Chen 2023, RIN).
    ddpm_index: number of the step, 0 to 999, of linear β (Ho et al. 2020, DiT, ADM from 128 pixels). adm_index: of 1000
    steps of cosine β. iddpm_index: of 4000 steps of cosine β, times 1000/4000 (Nichol and Dhariwal 2021). Between steps
    they are interpolated. flow: time of the linear interpolant in [0, 1], 1 being the image (torchcfm). flow_1000:
    1000·(1 − that), diffusers' time of flow matching.
    """
    logsnr = logsnr.float()
    if kind == "edm":
        return logsnr / -8
    if kind == "ddpm":
        spread = _BETA_MAX - _BETA_MIN
        return 1000 * ((_BETA_MIN**2 + 2 * spread * F.softplus(-logsnr)).sqrt() - _BETA_MIN) / spread
    if kind == "angle":
        return 1000 * (2 / math.pi) * torch.atan(torch.exp(-logsnr / 2))
    if kind == "gamma":
        return 1000 * torch.sigmoid(logsnr)
    if kind == "ddpm_index":
        return step_number(logsnr, linear_betas(1000, logsnr.device))
    if kind == "adm_index":
        return step_number(logsnr, cosine_betas(1000, logsnr.device))
    if kind == "iddpm_index":
        return step_number(logsnr, cosine_betas(4000, logsnr.device)) * (1000 / 4000)
    if kind == "flow":
        return torch.sigmoid(logsnr / 2)
    if kind == "flow_1000":
        return 1000 * torch.sigmoid(-logsnr / 2)
    raise SettingError("noise_input", kind, f"one of {', '.join(get_args(NoiseInput))}")


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Return a context in which operations keep the precision of their inputs (the meta device has no autocast)."""
    return nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)


class SinusoidalEmbedding(nn.Module):
    """Cosines and sines of a scalar at geometric frequencies 1 … 1/max_period. (B,) → (B, dim), dim even.

    endpoint: whether the lowest frequency is 1/max_period itself (DDPM, DDPM++) or one step short of it (ADM, DiT).
    """

    def __init__(self, dim: int, max_period: float = 10_000, endpoint: bool = False) -> None:
        super().__init__()
        if dim % 2:
            raise SettingError("noise_mult", dim, "an even width of the noise-level embedding")
        half = dim // 2
        exponent = torch.arange(half, dtype=torch.float32) / max(half - int(endpoint), 1)
        self.frequencies: Tensor
        self.register_buffer("frequencies", max_period**-exponent, persistent=False)

    def forward(self, value: Tensor) -> Tensor:
        angles = value.float()[:, None] * self.frequencies
        return torch.cat([angles.cos(), angles.sin()], dim=1)


class FourierEmbedding(nn.Module):
    """Cosines and sines of a scalar at random, fixed, normally distributed frequencies. (B,) → (B, dim), dim even.

    The frequencies are in the state dict: a checkpoint only works with its own (NCSN++, Song et al. 2021).
    """

    def __init__(self, dim: int, bandwidth: float = 16.0) -> None:
        super().__init__()
        if dim % 2:
            raise SettingError("mapping_width", dim, "an even number")
        self.frequencies: Tensor
        self.register_buffer("frequencies", torch.randn(dim // 2) * bandwidth)

    def forward(self, value: Tensor) -> Tensor:
        angles = value.float()[:, None] * (2 * math.pi * self.frequencies)
        return torch.cat([angles.cos(), angles.sin()], dim=1)


def one_hot_or_null(label: Tensor | None, num_classes: int, batch: int, device: torch.device) -> Tensor:
    """Return one-hot rows (B, num_classes) float32 of labels (B,) int64; zero rows for `num_classes` and None.

    Control flow does not depend on values, so it works on the meta device and traces into one graph.
    """
    if label is None:
        return torch.zeros(batch, num_classes, device=device)
    return (label[:, None] == torch.arange(num_classes, device=device)).float()


class LabelEmbedding(nn.Module):
    """A learned vector per class; no label is the zero vector, plus the bias if there is one.

    (B,) int64 in [0, num_classes], where num_classes means "no label" → (B, dim). Rows start as N(0, 1).
    """

    def __init__(self, num_classes: int, dim: int, bias: bool = False) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.weight = nn.Parameter(torch.randn(num_classes, dim))
        self.bias = nn.Parameter(torch.zeros(dim)) if bias else None

    def forward(self, label: Tensor | None, batch: int) -> Tensor:
        one_hot = one_hot_or_null(label, self.num_classes, batch, self.weight.device)
        embedding = one_hot @ self.weight
        return embedding if self.bias is None else embedding + self.bias


class GroupNorm(nn.Module):
    """Group normalisation with at least four channels per group, in the precision of its input.

    (B, C, H, W) → (B, C, H, W). torch.autocast on CUDA would compute it in float32 and return float32, although the
    kernel accumulates in float32 anyway.
    """

    def __init__(self, channels: int, groups: int = 32, eps: float = 1e-5) -> None:
        super().__init__()
        self.groups = math.gcd(channels, min(groups, max(channels // 4, 1)))
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        with without_autocast(x.device):
            return F.group_norm(x, self.groups, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)


def make_norm(kind: Literal["group", "layer", "none"], channels: int, eps: float = 1e-5) -> nn.Module:
    """group: GroupNorm of 32 groups; layer: GroupNorm of one group; none: the identity."""
    return nn.Identity() if kind == "none" else GroupNorm(channels, groups=32 if kind == "group" else 1, eps=eps)


def scale_and_shift(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """x·(1 + scale) + shift in the precision of x. x (B, C, H, W), scale and shift (B, C)."""
    scale, shift = (t.to(x.dtype)[:, :, None, None] for t in (scale, shift))
    return torch.addcmul(shift, x, 1 + scale)


class Resample(nn.Module):
    """Factor-two resampling with a separable filter, (B, C, H, W) → (B, C, H/2, W/2) or (B, C, 2H, 2W).

    The filter (1, 1) is a 2 × 2 mean on the way down and nearest neighbours on the way up. A longer filter sees zeros
    beyond the border, unless `padded` is False: then its input already has the extra rows and columns.
    """

    def __init__(
        self, mode: Literal["keep", "down", "up"], taps: tuple[int, ...] = (1, 1), padded: bool = True
    ) -> None:
        super().__init__()
        if len(taps) % 2 or not taps or sum(taps) == 0:
            raise SettingError("resample_filter", taps, "an even number of taps whose sum is not 0")
        self.mode, self.box = mode, tuple(taps) == (1, 1)
        self.padding = (len(taps) - 1) // 2 if padded else 0
        line = torch.tensor(taps, dtype=torch.float32) / sum(taps)
        self.kernel: Tensor
        self.register_buffer("kernel", line.outer(line)[None, None], persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.mode == "keep":
            return x
        if self.box:
            return F.avg_pool2d(x, 2) if self.mode == "down" else F.interpolate(x, scale_factor=2, mode="nearest")
        channels = x.shape[1]
        kernel = self.kernel.to(x.dtype).expand(channels, 1, -1, -1)
        if self.mode == "down":
            return F.conv2d(x, kernel, stride=2, padding=self.padding, groups=channels)
        return F.conv_transpose2d(x, 4 * kernel, stride=2, padding=self.padding, groups=channels)


def attention_at(level: int, resolution: int, attn_resolutions: tuple[int, ...]) -> bool:
    """Return whether a level of a UNet (0 is the finest) has a side s with s ≤ r < 2s for an r in attn_resolutions."""
    side = resolution / 2**level
    return any(side <= r < 2 * side for r in attn_resolutions)


def to_tokens(x: Tensor) -> Tensor:
    """(B, C, H, W) → (B, H·W, C); free when x is channels-last."""
    return x.permute(0, 2, 3, 1).flatten(1, 2)


def to_image(tokens: Tensor, height: int, width: int) -> Tensor:
    """(B, H·W, C) → (B, C, H, W) with channels-last strides; free."""
    return tokens.unflatten(1, (height, width)).permute(0, 3, 1, 2)


def multi_head_attention(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """Attend in `heads` slices of the width. q (B, N, D), k and v (B, M, D) → (B, N, D)."""
    q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k, v))
    return attend(q, k, v).transpose(1, 2).flatten(2)


def self_attention(qkv: Tensor, heads: int) -> Tensor:
    """Attend in `heads` slices of the width. qkv (B, N, 3·D), queries before keys before values → (B, N, D).

    On a GPU the three are padded together to the width that fused kernels take: each alone would be copied twice.
    """
    packed = qkv.unflatten(-1, (3, heads, -1))
    width = packed.shape[-1]
    if packed.device.type == "cuda" and width % HEAD_MULTIPLE:
        packed = F.pad(packed, (0, -width % HEAD_MULTIPLE))
    q, k, v = (t.transpose(1, 2) for t in packed.unbind(2))
    return attend(q, k, v, scale=1 / math.sqrt(width))[..., :width].transpose(1, 2).flatten(2)


class SelfAttention2d(nn.Module):
    """Every pixel attends to every other: norm, q k v, attention, projection. (B, C, H, W) → the same, not yet added.

    heads must divide channels.
    """

    def __init__(self, channels: int, heads: int, norm: nn.Module) -> None:
        super().__init__()
        if heads < 1 or channels % heads:
            raise SettingError("num_heads", heads, f"a divisor of the {channels} channels")
        self.heads = heads
        self.norm = norm
        self.qkv = nn.Linear(channels, 3 * channels)
        self.out = nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        h = self_attention(self.qkv(to_tokens(self.norm(x))), self.heads)
        return to_image(self.out(h), *x.shape[2:])


def pad_to_multiple(x: Tensor, multiple: int) -> Tensor:
    """Repeat the last row and column until height and width divide by `multiple`. (B, C, H, W) → (B, C, H', W')."""
    down, right = -x.shape[2] % multiple, -x.shape[3] % multiple
    return F.pad(x, (0, right, 0, down), mode="replicate") if down or right else x


class Backbone(nn.Module):
    """An architecture: how a denoising network is called, and what training asks of it.

    forward(x_in, logsnr, label=None, state=None, **extra) → (prediction, state)

    x_in: (B, C, H, W) noisy images after input scaling. Any H and W: the input is padded inside and the output
        cropped; learned positions are interpolated for a grid other than that of `resolution`.
    logsnr: (B,) float32, ln(alpha²/sigma²)
    label: (B,) int64 in [0, num_classes]; num_classes and None mean "no label"
    state: what the previous call returned, or None; only models with `carries_state` use it
    extra: keywords of some architectures, such as augment_label (B, augment_dim)
    prediction: (B, out_channels or C, H, W) in the precision of x_in

    The constructor takes (resolution, channels=3, num_classes=0, *, settings with defaults) and raises ValueError,
    naming the setting, for settings that it cannot have.
    """

    carries_state = False  # whether forward returns a state for the next call; training makes one more pass for it
    checkpointed = False

    def blocks_for_fsdp(self) -> list[nn.Module]:
        """Return the modules that FSDP2 shards one by one, in the order in which they run; none contains another."""
        raise NotImplementedError

    def no_weight_decay(self) -> set[str]:
        """Return the names of parameters with two dimensions or more that weight decay must leave alone."""
        return set()

    def set_activation_checkpointing(self, enabled: bool) -> None:
        """Recompute each block in the backward pass instead of keeping its activations."""
        self.checkpointed = enabled

    def run_block(self, block: Callable[..., Any], *inputs: Any) -> Any:
        """Call a block; if it is checkpointed and gradients are needed, its activations are recomputed in backward."""
        if self.checkpointed and torch.is_grad_enabled():
            return checkpoint(block, *inputs, use_reentrant=False)
        return block(*inputs)


def check_levels(resolution: int, channel_mult: tuple[float, ...], num_blocks: int) -> None:
    """Raise ValueError if the level settings are impossible."""
    if resolution < 1 or not channel_mult or num_blocks < 1:
        raise ValueError(
            f"resolution = {resolution}, channel_mult = {channel_mult}, num_blocks = {num_blocks}: "
            "expected a positive side, at least one level and at least one block per level"
        )
    coarsest = 2 ** (len(channel_mult) - 1)
    if coarsest > resolution:
        expected = f"at most {resolution.bit_length()} levels at a resolution of {resolution}"
        raise SettingError("channel_mult", channel_mult, expected)
