"""A ladder of sizes for every backbone: the networks among which `diffscale recommend` looks for the best size.

A rung has about twice the parameters of the one below. Width and depth grow together, as in the published sizes of each
backbone, and the number of tokens or the coarsest side stays, so that the members of a family differ in size alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from diffscale.models.tokens import narrow_tokens

Settings = dict[str, Any]

TRANSFORMERS = (
    (16, 2), (24, 2), (32, 2), (48, 2), (64, 2), (80, 3), (112, 4), (144, 5), (192, 6),
    (256, 7), (320, 9), (384, 12), (512, 14), (640, 18), (768, 24), (1024, 28), (1280, 32),
)  # fmt: skip
"""(width, depth) of DiT and JiT; (384, 12) is DiT-S."""
UVITS = ((16, 1), (32, 2), *TRANSFORMERS[3:], (1536, 36))
"""The same of UViT, whose convolutions have half of the parameters of its smallest members."""
CONVOLUTIONS = (
    (4, 1), (6, 1), (8, 1), (12, 1), (16, 1), (24, 1), (32, 1), (48, 1), (64, 1),
    (64, 2), (96, 2), (128, 2), (192, 2), (256, 3), (320, 4), (448, 4), (576, 5),
)  # fmt: skip
"""(width of the first level, blocks per level) of UNet and EDM2; (128, 2) is ADM's for CIFAR-10."""
COLOURS = 3
"""Channels of an image."""
SMALL = 10
"""Sizes below this have fewer tokens and blocks per level besides the patches, as the presets for a CPU have."""


def dit(size: int, resolution: int) -> Settings:
    """Return a DiT of 64 to 256 tokens."""
    width, depth = TRANSFORMERS[size]
    return {
        "name": "dit",
        "patch_size": _patch(resolution),
        "width": width,
        "depth": depth,
        "num_heads": width // _head(width),
    }


def jit(size: int, resolution: int) -> Settings:
    """Return a JiT of 64 to 256 tokens; class tokens join in the middle, as in the published sizes."""
    context = {"bottleneck": min(TRANSFORMERS[size][0], 128), "context_start": TRANSFORMERS[size][1] // 3}
    tokens = {"context_tokens": 4 if size < SMALL else 32}
    return dit(size, resolution) | {"name": "jit"} | context | tokens


def uvit(size: int, resolution: int) -> Settings:
    """Return a UViT whose transformer works on 64 tokens, or on 256 above 32 pixels."""
    width, depth = UVITS[size]
    levels = _halvings(resolution, 8 if resolution <= 32 else 16)
    folded = min(levels - 1, 1)
    finest = max(width // 3 // 8, 1 + folded) * 8  # wider than a folded patch
    return {
        "name": "uvit",
        "patch_levels": folded,
        "conv_widths": [finest * 2**k for k in range(levels - folded)],
        "conv_blocks": 1 if size < SMALL else 2,
        "width": width,
        "depth": depth,
        "num_heads": width // _head(width),
        "embedding_width": min(max(width, 32), 1024),
    }


def unet(size: int, resolution: int) -> Settings:
    """Return a UNet whose coarsest level has a side of 8, with attention there, or of 16 above 64 pixels."""
    width, blocks = CONVOLUTIONS[size]
    coarsest = 8 if resolution <= 64 else 16
    return {
        "name": "unet",
        "model_channels": width,
        "channel_mult": [1] + [2] * _halvings(resolution, coarsest),
        "num_blocks": blocks,
        "attn_resolutions": [coarsest],
        "channels_per_head": min(2 * width, 64),
    }


def edm2(size: int, resolution: int) -> Settings:
    """Return an EDM2 network of the levels of `unet`."""
    return unet(size, resolution) | {"name": "edm2"}


def rin(size: int, resolution: int) -> Settings:
    """Return a RIN in the proportions of the preset `rin-conv-32`, of 1,024 tokens above 64 pixels as the authors'."""
    width, depth = TRANSFORMERS[size]
    return {
        "name": "rin",
        "patch_size": _patch(resolution) if resolution <= 64 else resolution // 32,
        "interface_width": width,
        "interface_mlp_ratio": 4,
        "latents": 16 if size < SMALL else 64,
        "latent_width": width,
        "latent_heads": width // _head(width),
        "rw_heads": width // _head(width),
        "num_blocks": (depth + 1) // 2,
        "layers": 1 if depth < 8 else 2,
        "zero_output": True,
        "self_conditioning": False,
        "start": "authors",
        "zero_writes": True,
        "time_on_tiles": True,
        "tile_conv": 3,
        "qk_norm": True,
    }


def hdit(size: int, resolution: int) -> Settings:
    """Return an HDiT of two levels, the coarser with global attention."""
    width, depth = TRANSFORMERS[size]
    head = min(_head(width), 16)
    outer = max(width // 2 // head, 1) * head
    return {
        "name": "hdit",
        "patch_size": max(_patch(resolution) // 2, 1),
        "widths": [outer, width],
        "depths": [1, depth],
        "head": head,
        "mapping_width": min(max(width, 32), 768),
        "mapping_depth": 1,
    }


FAMILIES: Mapping[str, Callable[[int, int], Settings]] = {
    "unet": unet,
    "edm2": edm2,
    "uvit": uvit,
    "rin": rin,
    "dit": dit,
    "jit": jit,
    "hdit": hdit,
}
"""By backbone: a function of (rung, side of the images in pixels) that returns the settings `model`."""
RUNGS = len(TRANSFORMERS)
"""Number of sizes of every family."""


def smallest(backbone: str, resolution: int) -> int | None:
    """Return the first size from which on tokens are wider than their patches, None if there is none."""
    wide = [narrow_tokens(FAMILIES[backbone](size, resolution), COLOURS) is None for size in range(RUNGS)]
    return wide.index(True) if True in wide else None


def _patch(resolution: int) -> int:
    """Return the side of a patch: 64 tokens up to 32 pixels, 256 from 64 pixels on."""
    return max(resolution // (8 if resolution <= 32 else 16), 1)


def _head(width: int) -> int:
    return 8 if width < 32 else 16 if width < 192 else 32 if width < 320 else 64


def _halvings(resolution: int, coarsest: int) -> int:
    """Return how often a side is halved on the way to the coarsest one, at least once."""
    return max((resolution // coarsest).bit_length() - 1, 1)
