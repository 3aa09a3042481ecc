"""Who races whom in training_step.py: our network with a peer's widths, resolutions and attention places, and as many
blocks as bring its FLOPs for one image nearest to the peer's.

Each entry builds a network that takes (images (B, 3, S, S), noise level (B,)) and returns a prediction of that shape.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from diffscale.models import create_model

Build = Callable[[], nn.Module]


class Race(NamedTuple):
    peer: str  # package and class
    side: int  # of the images
    batch: int
    ours: Build
    theirs: Build


class Wrapped(nn.Module):
    """A network behind the one call of the race; `pick` takes the prediction out of what it returns."""

    def __init__(self, network: nn.Module, pick: Callable[[Any], Tensor] = lambda out: out) -> None:
        super().__init__()
        self.network, self.pick = network, pick

    def forward(self, images: Tensor, noise: Tensor) -> Tensor:
        return self.pick(self.network(images, noise))


def ours(name: str, **settings: Any) -> Build:
    return lambda: Wrapped(create_model(name, **settings), lambda out: out[0])


def diffusers_unet(**settings: Any) -> Build:
    def build() -> nn.Module:
        from diffusers import UNet2DModel

        network: nn.Module = UNet2DModel(**settings)  # type: ignore[assignment]
        return Wrapped(network, lambda out: out.sample)

    return build


def lucidrains_unet(**settings: Any) -> Build:
    def build() -> nn.Module:
        from denoising_diffusion_pytorch import Unet

        return Wrapped(Unet(**settings))

    return build


def lucidrains_uvit(**settings: Any) -> Build:
    def build() -> nn.Module:
        from denoising_diffusion_pytorch.simple_diffusion import UViT

        return Wrapped(UViT(**settings))

    return build


def lucidrains_rin(**settings: Any) -> Build:
    def build() -> nn.Module:
        from rin_pytorch import RIN

        return Wrapped(RIN(**settings))

    return build


def _levels(n: int, at: int, kind: str) -> tuple[str, ...]:
    """diffusers' names of the blocks of n levels, the level `at` with attention."""
    blocks = [f"{'Attn' if i == at else ''}{kind}Block2D" for i in range(n)]
    return tuple(blocks if kind == "Down" else reversed(blocks))


_DDPM: dict[str, Any] = {"resample": "conv", "adaptive_scale": False}
_OURS_CIFAR10 = {**_DDPM, "resolution": 32, "model_channels": 128, "num_heads": 1}

RACES: dict[str, Race] = {
    "unet-small": Race(
        "diffusers.UNet2DModel",
        32,
        16,
        ours(
            "unet",
            resolution=32,
            model_channels=32,
            channel_mult=(1, 2, 4),
            attn_resolutions=(8,),
            channels_per_head=32,
            **_DDPM,
        ),
        diffusers_unet(
            sample_size=32,
            block_out_channels=(32, 64, 128),
            down_block_types=_levels(3, 2, "Down"),
            up_block_types=_levels(3, 2, "Up"),
            attention_head_dim=32,
            norm_num_groups=8,
        ),
    ),
    "unet-cifar10": Race(
        "diffusers.UNet2DModel",
        32,
        8,
        ours("unet", channel_mult=(1, 2, 2, 2), attn_resolutions=(16,), **_OURS_CIFAR10),
        diffusers_unet(
            sample_size=32,
            block_out_channels=(128, 256, 256, 256),
            down_block_types=_levels(4, 1, "Down"),
            up_block_types=_levels(4, 1, "Up"),
            attention_head_dim=None,
        ),
    ),
    "unet-lucidrains": Race(
        "denoising_diffusion_pytorch.Unet",
        32,
        16,
        ours(
            "unet",
            resolution=32,
            model_channels=32,
            channel_mult=(1, 2, 4),
            attn_resolutions=(8,),
            num_heads=4,
            **_DDPM,
        ),
        lucidrains_unet(dim=32, dim_mults=(1, 2, 4)),
    ),
    "uvit-lucidrains": Race(
        "denoising_diffusion_pytorch.simple_diffusion.UViT",
        32,
        16,
        ours(
            "uvit",
            resolution=32,
            patch_levels=0,
            conv_widths=(64, 64),
            conv_blocks=3,
            width=256,
            depth=6,
            num_heads=4,
            embedding_width=256,
        ),
        lucidrains_uvit(dim=64, dim_mults=(1, 4), vit_depth=6, vit_dropout=0.0, attn_heads=4, attn_dim_head=64),
    ),
    "rin-lucidrains": Race(
        "rin_pytorch.RIN",
        32,
        16,
        ours(
            "rin",
            resolution=32,
            patch_size=2,
            interface_width=128,
            interface_mlp_ratio=4,
            latents=64,
            latent_width=256,
            num_blocks=3,
            layers=3,
            latent_heads=4,
            rw_heads=4,
        ),
        lucidrains_rin(
            dim=128,
            image_size=32,
            patch_size=2,
            depth=3,
            latent_self_attn_depth=2,
            dim_latent=256,
            num_latents=64,
            patches_self_attn=False,
            heads=4,
            dim_head=64,
        ),
    ),
    "unet-imagenet64": Race(  # for a GPU
        "diffusers.UNet2DModel",
        64,
        64,
        ours(
            "unet",
            resolution=64,
            model_channels=192,
            channel_mult=(1, 2, 3, 4),
            num_blocks=3,
            attn_resolutions=(16,),
            **_DDPM,
        ),
        diffusers_unet(
            sample_size=64,
            block_out_channels=(192, 384, 576, 768),
            down_block_types=_levels(4, 2, "Down"),
            up_block_types=_levels(4, 2, "Up"),
            layers_per_block=3,
            attention_head_dim=64,
        ),
    ),
    "rin-imagenet64": Race(  # for a GPU
        "rin_pytorch.RIN",
        64,
        128,
        ours("rin-imagenet64"),
        lucidrains_rin(
            dim=512,
            image_size=64,
            patch_size=8,
            depth=4,
            latent_self_attn_depth=4,
            dim_latent=768,
            num_latents=128,
            patches_self_attn=False,
            heads=16,
            dim_head=48,
        ),
    ),
}


def training_flops(build: Build, side: int) -> tuple[int, float]:
    """Return (parameters, FLOPs of forward and backward for one image), counted on the meta device."""
    from torch.nn.attention import SDPBackend, sdpa_kernel  # import cost
    from torch.utils.flop_counter import FlopCounterMode  # import cost

    with torch.device("meta"):
        network = build()
        images, noise = torch.empty(1, 3, side, side), torch.empty(1)
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            network(images, noise).sum().backward()
    return sum(p.numel() for p in network.parameters()), float(counter.get_total_flops())
