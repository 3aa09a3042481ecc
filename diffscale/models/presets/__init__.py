"""Networks by name: published configurations, and tiny ones for a CPU."""

from diffscale.models.presets.convolutional import CONVOLUTIONAL
from diffscale.models.presets.transformers import TRANSFORMERS

PRESETS = {**CONVOLUTIONAL, **TRANSFORMERS}

__all__ = ["CONVOLUTIONAL", "PRESETS", "TRANSFORMERS"]
