"""The convolutional UNet with everything the field added to it, each a setting that can be switched off.

Published configurations (models/presets): DDPM (Ho et al. 2020), DDPM++ and NCSN++ (Song et al. 2021, as tuned by
Karras et al. 2022), ADM (Dhariwal & Nichol 2021). Without `skips` it is the plain autoencoder baseline.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffscale.core.errors import SettingError
from diffscale.core.ranges import Depth, DropRate, Epsilon, Factor, Share, Size, SizeOrZero, Tap
from diffscale.models.layers import (
    Backbone,
    FourierEmbedding,
    LabelEmbedding,
    NoiseInput,
    Resample,
    SelfAttention2d,
    SinusoidalEmbedding,
    attention_at,
    check_levels,
    make_norm,
    noise_condition,
    pad_to_multiple,
    scale_and_shift,
    without_autocast,
)


@dataclass(frozen=True)
class BlockSettings:
    """The settings that all residual blocks of one UNet share; the fields are UNet's own settings of the same names."""

    embedding_width: int
    residual: bool
    residual_scale: float
    norm: Literal["group", "layer", "none"]
    norm_eps: float
    adaptive_scale: bool
    dropout: float
    resample_filter: tuple[int, ...]
    resample_projection: bool


class UNetBlock(nn.Module):
    """norm, silu, (resample), conv, + embedding, norm, silu, dropout, conv, + shortcut; then attention if heads > 0.

    (B, Cin, H, W), (B, E) → (B, Cout, H', W'), H' = H, H/2 or 2H.
    """

    def __init__(
        self,
        channels_in: int,
        channels_out: int,
        settings: BlockSettings,
        *,
        resample: Literal["keep", "down", "up"] = "keep",
        heads: int = 0,
    ) -> None:
        super().__init__()
        self.settings = s = settings
        self.resample = Resample(resample, s.resample_filter)
        self.norm1 = make_norm(s.norm, channels_in, s.norm_eps)
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, padding=1)
        self.embed = nn.Linear(s.embedding_width, channels_out * (2 if s.adaptive_scale else 1))
        self.norm2 = make_norm(s.norm, channels_out, s.norm_eps)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, padding=1)
        projected = channels_in != channels_out or (resample != "keep" and s.resample_projection)
        self.shortcut = nn.Conv2d(channels_in, channels_out, 1) if s.residual and projected else nn.Identity()
        self.attention = (
            SelfAttention2d(channels_out, heads, make_norm(s.norm, channels_out, s.norm_eps)) if heads else None
        )

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        h = self.conv1(self.resample(F.silu(self.norm1(x))))
        modulation = self.embed(embedding)
        if self.settings.adaptive_scale:
            scale, shift = modulation.chunk(2, dim=1)
            h = F.silu(scale_and_shift(self.norm2(h), scale, shift))
        else:
            h = F.silu(self.norm2(h + modulation[:, :, None, None].to(h.dtype)))
        h = self.conv2(F.dropout(h, self.settings.dropout, self.training))
        if self.settings.residual:
            h = self.rescale(self.shortcut(self.resample(x)) + h)
        return self.attend(h)

    def attend(self, h: Tensor) -> Tensor:
        """The attention of the block, if it has one, added like the residual branch."""
        if self.attention is None:
            return h
        a = self.attention(h)
        return self.rescale(h + a) if self.settings.residual else a

    def rescale(self, total: Tensor) -> Tensor:
        """A residual sum times `residual_scale`; 1 costs nothing."""
        scale = self.settings.residual_scale
        return total * scale if scale != 1 else total


class ConvResample(nn.Module):
    """DDPM's change of resolution: a strided convolution down, nearest neighbours and a convolution up.

    padding: zeros on both sides of the way down, or at its end alone, as TensorFlow's SAME pads an even side
    """

    def __init__(self, channels: int, mode: Literal["down", "up"], padding: Literal["both", "end"] = "both") -> None:
        super().__init__()
        self.up, self.pads_end = mode == "up", mode == "down" and padding == "end"
        self.conv = nn.Conv2d(channels, channels, 3, stride=1 if self.up else 2, padding=0 if self.pads_end else 1)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        if self.pads_end:
            x = F.pad(x, (0, 1, 0, 1))
        return self.conv(F.interpolate(x, scale_factor=2, mode="nearest") if self.up else x)


class InputPyramid(nn.Module):
    """NCSN++'s path for the image itself parallel to the encoder: downsampled, projected, added at every level.

    residual: 3 × 3 convolution, then the filter, and the sum is what the next level gets. skip: the filter, then 1 × 1.
    """

    def __init__(self, channels_in: int, channels: int, residual: bool, taps: tuple[int, ...]) -> None:
        super().__init__()
        self.residual = residual
        self.down = Resample("down", taps, padded=not residual)
        margin = 1 + (len(taps) - 1) // 2  # of zeros, which the convolution sees before the filter does
        self.conv = nn.Conv2d(channels_in, channels, 3 if residual else 1, padding=margin if residual else 0)

    def forward(self, x: Tensor, pyramid: Tensor) -> tuple[Tensor, Tensor]:
        """x (B, C, H, W), pyramid (B, Cin, 2H, 2W) → their sum, and the next level's pyramid."""
        if self.residual:
            x = (x + self.down(self.conv(pyramid))) * math.sqrt(0.5)
            return x, x
        pyramid = self.down(pyramid)
        return x + self.conv(pyramid), pyramid


class OutputHead(nn.Module):
    """norm, silu, 3 × 3 convolution to the output channels."""

    def __init__(self, channels: int, channels_out: int, norm: Literal["group", "layer", "none"], eps: float) -> None:
        super().__init__()
        self.norm = make_norm(norm, channels, eps)
        self.conv = nn.Conv2d(channels, channels_out, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.silu(self.norm(x)))


class UNet(Backbone):
    """Encoder, middle, decoder with skips between equal resolutions.

    forward(x_in (B, C, H, W), logsnr (B,), label (B,) int64 | None, state) → (prediction (B, out_channels, H, W), None)
    for any H and W: the input is padded inside to a multiple of 2^(levels − 1) and the output cropped. The label
    `num_classes` and label=None mean "no label". Optional keywords: augment_label (B, augment_dim) of non-leaking
    augmentation; image (B, image_channels, h, w) to condition on, resized to H × W if it differs. Either may be None,
    which stands for zeros.

    As initialised the output is exactly zero (init="torch") or below 1e-3 (init="xavier"): the last convolution of
    each block, of each attention and of the output starts at zero_gain times its ordinary values.
    """

    def __init__(
        self,
        resolution: int,
        channels: int = 3,
        num_classes: int = 0,
        *,
        model_channels: Size = 128,  # width of the first level; channel_mult multiplies it
        channel_mult: tuple[Factor, ...] = (1, 2, 2, 2),  # width per level in model_channels, finest first
        stem_channels: SizeOrZero = 0,  # width of the first convolution; 0: as the first level
        num_blocks: Depth = 2,  # residual blocks per level; the decoder has one more
        attn_resolutions: tuple[Size, ...] = (16,),  # sides with attention; the nearest level at or below each
        decoder_attention: Literal["all", "last", "none"] = "all",  # which decoder blocks at those sides have it
        middle_attention: bool = True,  # attention between encoder and decoder
        num_heads: SizeOrZero = 0,  # heads of every attention; 0: one per channels_per_head
        channels_per_head: Size = 64,  # width of a head when num_heads is 0
        skips: bool = True,  # encoder features reach the decoder; False is an autoencoder
        residual: bool = True,  # blocks and attentions add to their input
        residual_scale: Factor = 1.0,  # factor of the sum after a block; √½ keeps the variance (NCSN++, DDPM++)
        norm: Literal["group", "layer", "none"] = "group",  # normalisation: 32 groups, one group, or nothing
        norm_eps: Epsilon = 1e-5,  # what a norm adds to the variance
        dropout: DropRate = 0.0,  # dropout before the second convolution of a block
        adaptive_scale: bool = True,  # the embedding scales and shifts after the norm; False: is added before it
        resample: Literal["block", "conv"] = "block",  # change of side: in a residual block, or DDPM's bare convolution
        resample_padding: Literal["both", "end"] = "both",  # padding of DDPM's convolution down; Ho et al. 2020: end
        resample_filter: tuple[Tap, ...] = (1, 1),  # even number of taps; (1, 1): box; NCSN++ has (1, 3, 3, 1)
        resample_projection: bool = False,  # a 1 × 1 convolution in the shortcut of resampling blocks (Song)
        input_pyramid: Literal["none", "skip", "residual"] = "none",  # the image enters every encoder level
        output_pyramid: bool = False,  # every decoder level adds to the output
        noise_input: NoiseInput = "edm",  # number that is embedded, see layers.noise_condition
        noise_embedding: Literal["sinusoidal", "sinusoidal_endpoint", "fourier"] = "sinusoidal",  # its embedding
        noise_mult: Size = 1,  # width of the noise-level embedding, in model_channels
        embedding_mult: Size = 4,  # width of the mapped embedding, in model_channels
        label_joins: Literal["noise", "mapped"] = "mapped",  # the label joins before or after the mapping network
        augment_dim: SizeOrZero = 0,  # width of augment_label; 0: no such input
        image_channels: SizeOrZero = 0,  # channels of the image to condition on; 0: no such input
        out_channels: SizeOrZero = 0,  # output channels; 0: as the image; ADM published twice as many
        init: Literal["torch", "xavier"] = "torch",  # initial weights: ADM's or Song's
        zero_gain: Share = 0.0,  # factor of the layers that start small; Song's recipe has 1e-5
    ) -> None:
        super().__init__()
        check_levels(resolution, channel_mult, num_blocks)
        self.num_classes, self.augment_dim, self.image_channels = num_classes, augment_dim, image_channels
        self.noise_input, self.label_joins, self.skips = noise_input, label_joins, skips
        self.multiple = 2 ** (len(channel_mult) - 1)
        out_channels = out_channels or channels
        widths = [int(model_channels * m) for m in channel_mult]
        if min(widths) < 1:
            raise SettingError("channel_mult", channel_mult, f"at least one channel of {model_channels} in each level")
        noise_width, width = model_channels * noise_mult, model_channels * embedding_mult
        settings = BlockSettings(
            width,
            residual,
            residual_scale,
            norm,
            norm_eps,
            adaptive_scale,
            dropout,
            tuple(resample_filter),
            resample_projection,
        )

        def heads_of(level: int, out: int, wanted: bool = True) -> int:
            attends = wanted and attention_at(level, resolution, attn_resolutions)
            return (num_heads or max(out // channels_per_head, 1)) if attends else 0

        def resampler(c: int, mode: Literal["down", "up"]) -> nn.Module:
            return (
                UNetBlock(c, c, settings, resample=mode)
                if resample == "block"
                else ConvResample(c, mode, resample_padding)
            )

        if noise_embedding == "fourier":
            self.embed_noise: nn.Module = FourierEmbedding(noise_width)
        else:
            self.embed_noise = SinusoidalEmbedding(noise_width, endpoint=noise_embedding.endswith("endpoint"))
        self.embed_augment = nn.Linear(augment_dim, noise_width, bias=False) if augment_dim else None
        self.map1, self.map2 = nn.Linear(noise_width, width), nn.Linear(width, width)
        early = label_joins == "noise"
        self.embed_label = LabelEmbedding(num_classes, noise_width if early else width, early) if num_classes else None

        c, pyramid = stem_channels or widths[0], channels + image_channels
        self.conv_in = nn.Conv2d(pyramid, c, 3, padding=1)
        self.encoder, self.pyramid_in = nn.ModuleList(), nn.ModuleDict()
        skip_widths = [c]
        for level, out in enumerate(widths):
            if level:
                self.encoder.append(resampler(c, "down"))
                if input_pyramid != "none":
                    key = str(len(self.encoder) - 1)  # which encoder entry it follows
                    self.pyramid_in[key] = InputPyramid(
                        pyramid, c, input_pyramid == "residual", settings.resample_filter
                    )
                    pyramid = c if input_pyramid == "residual" else pyramid
                skip_widths.append(c)
            for _ in range(num_blocks):
                self.encoder.append(UNetBlock(c, out, settings, heads=heads_of(level, out)))
                skip_widths.append(out)
                c = out
        middle_heads = (num_heads or max(c // channels_per_head, 1)) if middle_attention else 0
        self.middle = nn.ModuleList([UNetBlock(c, c, settings, heads=middle_heads), UNetBlock(c, c, settings)])
        self.decoder, self.pyramid_out = nn.ModuleList(), nn.ModuleDict()
        self.takes_skip: list[bool] = []
        for level, out in reversed(list(enumerate(widths))):
            if level != len(widths) - 1:
                self.decoder.append(resampler(c, "up"))
                self.takes_skip.append(False)
            for index in range(num_blocks + 1):
                wanted = decoder_attention == "all" or (decoder_attention == "last" and index == num_blocks)
                c += skip_widths.pop() if skips else 0
                self.decoder.append(UNetBlock(c, out, settings, heads=heads_of(level, out, wanted)))
                self.takes_skip.append(skips)
                c = out
            if output_pyramid and level:
                self.pyramid_out[str(len(self.decoder) - 1)] = OutputHead(c, out_channels, norm, norm_eps)
        self.raise_output = Resample("up", settings.resample_filter)
        self.head = OutputHead(c, out_channels, norm, norm_eps)
        self.initialise(init, zero_gain)

    @torch.no_grad()
    def initialise(self, init: Literal["torch", "xavier"], zero_gain: float) -> None:
        """torch: U(±√(1/fan_in)) for weights and biases, as ADM. xavier: Song's, zero biases, √0.2 for q, k and v."""
        attentions = [m for m in self.modules() if isinstance(m, SelfAttention2d)]
        small: list[nn.Conv2d | nn.Linear] = [a.out for a in attentions]
        for module in self.modules():
            if init == "xavier" and isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    module.bias.zero_()
        if init == "xavier":
            for attention in attentions:
                attention.qkv.weight.mul_(math.sqrt(0.2))
        small += [m.conv2 for m in self.modules() if isinstance(m, UNetBlock)]
        small += [m.conv for m in self.modules() if isinstance(m, OutputHead)]
        for layer in small:
            layer.weight.mul_(zero_gain)
            if layer.bias is not None:
                layer.bias.zero_()
        if self.embed_augment is not None:
            self.embed_augment.weight.mul_(1.0 if init == "xavier" else 0.0)

    def embed(self, logsnr: Tensor, label: Tensor | None, augment_label: Tensor | None) -> Tensor:
        """(B,) log SNR and the optional labels → (B, width), the vector that every block gets; always in float32."""
        vector = self.embed_noise(noise_condition(logsnr, self.noise_input))
        labels = self.embed_label(label, len(logsnr)) if self.embed_label is not None else 0.0
        if self.label_joins == "noise":
            vector = vector + labels
        if self.embed_augment is not None and augment_label is not None:
            vector = vector + self.embed_augment(augment_label)
        vector = self.map2(F.silu(self.map1(vector)))
        return F.silu(vector + labels if self.label_joins == "mapped" else vector)

    def with_image(self, x: Tensor, image: Tensor | None) -> Tensor:
        """The input with the channels of the conditioning image after its own."""
        if not self.image_channels:
            return x
        if image is None:
            image = x.new_zeros(x.shape[0], self.image_channels, *x.shape[2:])
        if image.shape[2:] != x.shape[2:]:
            image = F.interpolate(image, x.shape[2:], mode="bilinear", align_corners=False)
        return torch.cat([x, image.to(x.dtype)], dim=1)

    def forward(
        self,
        x_in: Tensor,
        logsnr: Tensor,
        label: Tensor | None = None,
        state: Tensor | None = None,
        *,
        augment_label: Tensor | None = None,
        image: Tensor | None = None,
    ) -> tuple[Tensor, None]:
        height, width = x_in.shape[2:]
        with without_autocast(x_in.device):
            embedding = self.embed(logsnr, label, augment_label)
        pyramid = pad_to_multiple(self.with_image(x_in, image), self.multiple)
        x = self.conv_in(pyramid)
        kept = [x]
        for index, block in enumerate(self.encoder):
            x = self.run_block(block, x, embedding)
            if str(index) in self.pyramid_in:
                x, pyramid = self.pyramid_in[str(index)](x, pyramid)
            kept.append(x)
        for block in self.middle:
            x = self.run_block(block, x, embedding)
        total: Tensor | None = None
        for index, (block, takes_skip) in enumerate(zip(self.decoder, self.takes_skip, strict=True)):
            if takes_skip:
                x = torch.cat([x, kept.pop()], dim=1)
            x = self.run_block(block, x, embedding)
            if str(index) in self.pyramid_out:
                part = self.pyramid_out[str(index)](x)
                total = self.raise_output(part if total is None else part + total)
        out = self.head(x)
        out = out if total is None else out + total
        return out[:, :, :height, :width].to(x_in.dtype), None

    def blocks_for_fsdp(self) -> list[nn.Module]:
        return [*self.encoder, *self.middle, *self.decoder]

    def no_weight_decay(self) -> set[str]:
        return {"embed_label.weight"} if self.embed_label is not None else set()
