"""Backbones: `create_model(name, **settings)` builds one of MODELS, or a published network of PRESETS."""

from __future__ import annotations

import difflib
from typing import Any

from torch import nn

from diffscale.models.dit import DiT
from diffscale.models.edm2 import EDM2
from diffscale.models.hdit import HDiT
from diffscale.models.jit import JiT
from diffscale.models.presets import PRESETS
from diffscale.models.rin import RIN
from diffscale.models.unet import UNet
from diffscale.models.uvit import UViT

__all__ = ["MODELS", "PRESETS", "create_model"]

MODELS: dict[str, type[nn.Module]] = {
    "unet": UNet,
    "edm2": EDM2,
    "uvit": UViT,
    "rin": RIN,
    "dit": DiT,
    "jit": JiT,
    "hdit": HDiT,
}


def create_model(name: str, **settings: Any) -> nn.Module:
    """Build the network of a name in MODELS (needs `resolution`) or in PRESETS (`settings` override the preset's).

    `models.layers.Backbone` says how it is called. Raises ValueError for an unknown name and for settings that the
    architecture cannot have.
    """
    if name in PRESETS:
        settings = PRESETS[name] | settings
        name = settings.pop("name")
    if name not in MODELS:
        near = difflib.get_close_matches(name, [*MODELS, *PRESETS], n=3)
        hint = f"; nearest: {', '.join(near)}" if near else ""
        raise ValueError(f"model = {name!r}: expected one of {', '.join(MODELS)} or a preset{hint}")
    return MODELS[name](**settings)
