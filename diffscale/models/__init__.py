"""Backbones: `create_model(name, **settings)` builds one of MODELS, or a published network of PRESETS."""

from __future__ import annotations

import difflib
from typing import Any

from torch import nn

from diffscale.models.presets.convolutional import PRESETS
from diffscale.models.registry import MODELS

__all__ = ["MODELS", "PRESETS", "create_model"]


def create_model(name: str, **settings: Any) -> nn.Module:
    """The network of that name, in MODELS (needs `resolution`) or in PRESETS (`settings` override the preset's).

    Its call is model(x_in (B, C, H, W), logsnr (B,), label (B,) int64 | None, state | None) → (prediction, state).
    Raises ValueError for an unknown name and for settings that the architecture cannot take.
    """
    if name in PRESETS:
        settings = PRESETS[name] | settings
        name = settings.pop("name")
    if name not in MODELS:
        near = difflib.get_close_matches(name, [*MODELS, *PRESETS], n=3)
        hint = f"; near it: {', '.join(near)}" if near else ""
        raise ValueError(f"model = {name!r}: expected one of {', '.join(MODELS)} or a preset{hint}")
    return MODELS[name](**settings)
