"""Presets of UNet and EDM2: published configurations, and tiny ones for a CPU.

Names start with the family, then the data they were published for. `create_model(name, **overrides)` builds one. The
parameter counts of the published ones are those of the authors' own code (tests/models/test_presets.py).
"""

from __future__ import annotations

from typing import Any

Preset = dict[str, Any]

# Ho et al. 2020: one head, the embedding is added, convolutions change the resolution.
_DDPM: Preset = {
    "name": "unet",
    "adaptive_scale": False,
    "resample": "conv",
    "num_heads": 1,
    "norm_eps": 1e-6,
    "noise_input": "ddpm",
    "noise_embedding": "sinusoidal_endpoint",
}

# Nichol & Dhariwal 2021 (improved DDPM): scale and shift, four heads, a learned variance.
_IDDPM: Preset = {
    "name": "unet",
    "resample": "conv",
    "num_blocks": 3,
    "num_heads": 4,
    "attn_resolutions": (16, 8),
    "noise_input": "ddpm",
    "out_channels": 6,
}

# Dhariwal & Nichol 2021 (guided diffusion): residual blocks change the resolution.
_ADM: Preset = {
    "name": "unet",
    "model_channels": 256,
    "attn_resolutions": (32, 16, 8),
    "num_classes": 1000,
    "noise_input": "ddpm",
    "out_channels": 6,
}

# Song et al. 2021, as configured by Karras et al. 2022; augment_dim 9 is their non-leaking augmentation.
_DDPMPP: Preset = {
    "name": "unet",
    "stem_channels": 128,
    "num_blocks": 4,
    "decoder_attention": "last",
    "num_heads": 1,
    "residual_scale": 0.5**0.5,
    "norm_eps": 1e-6,
    "adaptive_scale": False,
    "resample_projection": True,
    "noise_embedding": "sinusoidal_endpoint",
    "label_joins": "noise",
    "augment_dim": 9,
    "init": "xavier",
    "zero_gain": 1e-5,
}
_NCSNPP: Preset = _DDPMPP | {
    "noise_embedding": "fourier",
    "noise_mult": 2,
    "resample_filter": (1, 3, 3, 1),
    "input_pyramid": "residual",
}

# Karras et al. 2024. ImageNet-512 is in the latents of Stable Diffusion's autoencoder, 4 × 64 × 64.
_EDM2_WIDTHS = {"xxs": 64, "xs": 128, "s": 192, "m": 256, "l": 320, "xl": 384, "xxl": 448}
_EDM2_DROPOUT = {"m": 0.1, "l": 0.1, "xl": 0.1, "xxl": 0.1}


def _edm2(size: str, channels: int) -> Preset:
    width, dropout = _EDM2_WIDTHS[size], _EDM2_DROPOUT.get(size, 0.0)
    return {"name": "edm2", "resolution": 64, "channels": channels, "num_classes": 1000, "model_channels": width} | {
        "dropout": dropout
    }


CONVOLUTIONAL: dict[str, Preset] = {
    "unet-tiny": {
        "name": "unet",
        "resolution": 32,
        "model_channels": 16,
        "channel_mult": (1, 2, 4, 6),
        "num_blocks": 1,
        "attn_resolutions": (8,),
        "channels_per_head": 32,
    },
    "unet-cifar10-small": {
        "name": "unet",
        "resolution": 32,
        "model_channels": 32,
        "channel_mult": (1, 2, 4),
        "num_blocks": 2,
        "attn_resolutions": (8,),
        "channels_per_head": 32,
    },
    "unet-cifar10": {
        "name": "unet",
        "resolution": 32,
        "model_channels": 128,
        "channel_mult": (1, 2, 2),
        "num_blocks": 2,
        "attn_resolutions": (16, 8),
        "channels_per_head": 64,
    },
    "edm2-tiny": {
        "name": "edm2",
        "resolution": 32,
        "model_channels": 16,
        "channel_mult": (1, 2, 4, 6),
        "num_blocks": 1,
        "attn_resolutions": (8,),
        "channels_per_head": 32,
    },
    "ddpm-cifar10": _DDPM | {"resolution": 32, "dropout": 0.1},
    "ddpm-lsun256": _DDPM | {"resolution": 256, "channel_mult": (1, 1, 2, 2, 4, 4)},
    "iddpm-cifar10": _IDDPM | {"resolution": 32, "dropout": 0.3},
    "iddpm-imagenet64": _IDDPM | {"resolution": 64, "channel_mult": (1, 2, 3, 4)},
    "edm-cifar10-ddpmpp": _DDPMPP | {"resolution": 32, "channel_mult": (2, 2, 2), "dropout": 0.13},
    "edm-cifar10-ncsnpp": _NCSNPP | {"resolution": 32, "channel_mult": (2, 2, 2), "dropout": 0.13},
    "edm-ffhq64-ddpmpp": _DDPMPP | {"resolution": 64, "channel_mult": (1, 2, 2, 2), "dropout": 0.05},
    "edm-ffhq64-ncsnpp": _NCSNPP | {"resolution": 64, "channel_mult": (1, 2, 2, 2), "dropout": 0.05},
    "edm-imagenet64-adm": _ADM
    | {
        "resolution": 64,
        "model_channels": 192,
        "channel_mult": (1, 2, 3, 4),
        "num_blocks": 3,
        "dropout": 0.1,
        "noise_input": "edm",
        "out_channels": 0,
    },
    "adm-imagenet64": _ADM
    | {"resolution": 64, "model_channels": 192, "channel_mult": (1, 2, 3, 4), "num_blocks": 3, "dropout": 0.1},
    "adm-imagenet128": _ADM | {"resolution": 128, "channel_mult": (1, 1, 2, 3, 4), "num_heads": 4},
    "adm-imagenet256": _ADM | {"resolution": 256, "channel_mult": (1, 1, 2, 2, 4, 4)},
    "adm-imagenet512": _ADM | {"resolution": 512, "channel_mult": (0.5, 1, 1, 2, 2, 4, 4)},
    "adm-imagenet64-to-256": _ADM
    | {
        "resolution": 256,
        "model_channels": 192,
        "channel_mult": (1, 1, 2, 2, 4, 4),
        "num_heads": 4,
        "image_channels": 3,
    },
    "edm2-cifar10": {"name": "edm2", "resolution": 32, "model_channels": 128, "channel_mult": (1, 2, 2)},
    **{f"edm2-imagenet64-{size}": _edm2(size, 3) for size in ("xs", "s", "m", "l", "xl")},
    **{f"edm2-imagenet512-{size}": _edm2(size, 4) for size in _EDM2_WIDTHS},
}
