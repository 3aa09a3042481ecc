"""Presets of UViT, RIN and the transformers: published configurations, and tiny ones for a CPU.

Settings that a preset does not name have the default of the architecture. `dit-mini` and `jit-mini` cost about as much
as `dit-tiny` and `jit-tiny`, whose heads of 52 channels a GPU's attention pads and copies; theirs have 64.

DiT, JiT, rin-cifar10, rin-imagenet64 and hdit-* are the authors' released configurations. The papers give those of
UViT (two billion parameters, arXiv 2301.11093) and of RIN at 128 and 256 pixels (arXiv 2212.11972) without code.
"""

from __future__ import annotations

from typing import Any

Preset = dict[str, Any]

_DIT = {"s": (384, 12, 6), "b": (768, 12, 12), "l": (1024, 24, 16), "xl": (1152, 28, 16)}  # width, depth, heads


def _dit(size: str, patch_size: int) -> Preset:
    """DiT on latents of side 32 (images of side 256); the published networks also output a variance."""
    width, depth, heads = _DIT[size]
    return {
        "name": "dit",
        "resolution": 32,
        "channels": 4,
        "num_classes": 1000,
        "patch_size": patch_size,
        "width": width,
        "depth": depth,
        "num_heads": heads,
        "out_channels": 8,
    }


_JIT = {"b": (768, 12, 12, 4, 128), "l": (1024, 24, 16, 8, 128), "h": (1280, 32, 16, 10, 256)}


def _jit(size: str, patch_size: int, resolution: int) -> Preset:
    width, depth, heads, context_start, bottleneck = _JIT[size]
    return {
        "name": "jit",
        "resolution": resolution,
        "num_classes": 1000,
        "patch_size": patch_size,
        "width": width,
        "depth": depth,
        "num_heads": heads,
        "context_start": context_start,
        "bottleneck": bottleneck,
    }


_HDIT = {"name": "hdit", "patch_size": 4, "augment_dim": 9}
_RIN_IMAGENET = {
    "name": "rin",
    "num_classes": 1000,
    "interface_width": 512,
    "interface_mlp_ratio": 4,
    "latents": 128,
    "num_blocks": 4,
    "layers": 4,
    "latent_width": 768,
    "latent_heads": 16,
    "rw_heads": 16,
}
_RIN_SMALL = {
    "name": "rin",
    "resolution": 32,
    "patch_size": 4,
    "interface_width": 192,
    "interface_mlp_ratio": 4,
    "latents": 16,
    "latent_width": 128,
    "latent_heads": 4,
    "rw_heads": 4,
    "num_blocks": 3,
    "layers": 1,
    "zero_output": True,
    "self_conditioning": False,
    "start": "authors",
    "zero_writes": True,
}
_UVIT_2B = {
    "name": "uvit",
    "num_classes": 1000,
    "conv_widths": (128, 256, 512),
    "width": 2048,
    "depth": 36,
    "num_heads": 16,
    "dropout": 0.1,
    "embedding_width": 1024,
}

TRANSFORMERS: dict[str, Preset] = {
    "uvit-tiny": {
        "name": "uvit",
        "resolution": 32,
        "conv_widths": (64,),
        "conv_blocks": 1,
        "width": 192,
        "depth": 3,
        "num_heads": 6,
        "embedding_width": 128,
    },
    "rin-tiny": {
        "name": "rin",
        "resolution": 32,
        "patch_size": 4,
        "interface_width": 128,
        "latents": 28,
        "latent_width": 192,
        "latent_heads": 6,
        "rw_heads": 4,
        "num_blocks": 3,
        "layers": 2,
        "zero_output": True,
    },
    "rin-small-32": _RIN_SMALL,
    "rin-conv-32": _RIN_SMALL | {"time_on_tiles": True, "tile_conv": 3, "qk_norm": True},
    "dit-tiny": {"name": "dit", "resolution": 32, "patch_size": 4, "width": 208, "depth": 4, "num_heads": 4},
    "dit-mini": {"name": "dit", "resolution": 32, "patch_size": 4, "width": 192, "depth": 5, "num_heads": 3},
    "dit-cifar10": {"name": "dit", "resolution": 32, "patch_size": 2},
    "uvit-cifar10": {"name": "uvit", "resolution": 32, "dropout": 0.1},
    "rin-cifar10": {
        "name": "rin",
        "resolution": 32,
        "num_classes": 10,
        "patch_size": 2,
        "dropout": 0.1,
        "drop_path": 0.1,
    },
    "rin-imagenet64": _RIN_IMAGENET | {"resolution": 64, "patch_size": 8},
    "rin-imagenet128": _RIN_IMAGENET | {"resolution": 128, "patch_size": 4, "latent_width": 1024, "num_blocks": 6},
    "rin-imagenet256": _RIN_IMAGENET
    | {"resolution": 256, "patch_size": 8, "latents": 256, "latent_width": 1024, "num_blocks": 6},
    "uvit-imagenet128": _UVIT_2B | {"resolution": 128, "patch_levels": 0},
    "uvit-imagenet256": _UVIT_2B | {"resolution": 256, "patch_levels": 1, "patching": "5/3"},
    "uvit-imagenet512": _UVIT_2B | {"resolution": 512, "patch_levels": 2, "patching": "5/3"},
    "jit-tiny": {
        "name": "jit",
        "resolution": 32,
        "patch_size": 4,
        "bottleneck": 32,
        "width": 208,
        "depth": 4,
        "num_heads": 4,
        "context_tokens": 4,
        "context_start": 2,
    },
    "jit-mini": {
        "name": "jit",
        "resolution": 32,
        "patch_size": 4,
        "bottleneck": 32,
        "width": 192,
        "depth": 5,
        "num_heads": 3,
        "context_tokens": 4,
        "context_start": 2,
    },
    **{f"jit-{size}-16": _jit(size, 16, 256) for size in _JIT},
    **{f"jit-{size}-32": _jit(size, 32, 512) for size in _JIT},
    "hdit-tiny": {
        "name": "hdit",
        "resolution": 32,
        "patch_size": 2,
        "widths": (64, 192),
        "depths": (1, 3),
        "head": 32,
        "mapping_width": 128,
        "mapping_depth": 1,
    },
    "hdit-imagenet128": _HDIT
    | {
        "resolution": 128,
        "num_classes": 1000,
        "widths": (384, 768),
        "depths": (2, 11),
        "mapping_width": 768,
        "mapping_depth": 1,
    },
    "hdit-flowers256": _HDIT | {"resolution": 256, "widths": (128, 256, 512), "depths": (2, 2, 4)},
    "hdit-imagenet256": _HDIT
    | {"resolution": 256, "num_classes": 1000, "widths": (384, 768, 1536), "depths": (2, 2, 16)},
    **{f"dit-{size}-{patch}": _dit(size, patch) for size in _DIT for patch in (2, 4, 8)},
}
