"""Which backbones there are, by name."""

from __future__ import annotations

from torch import nn

from diffscale.models.edm2 import EDM2
from diffscale.models.unet import UNet

MODELS: dict[str, type[nn.Module]] = {
    "unet": UNet,
    "edm2": EDM2,
}
