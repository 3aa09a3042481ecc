"""Which backbones there are, by name."""

from __future__ import annotations

from torch import nn

from diffscale.models.dit import DiT
from diffscale.models.edm2 import EDM2
from diffscale.models.hdit import HDiT
from diffscale.models.jit import JiT
from diffscale.models.rin import RIN
from diffscale.models.unet import UNet
from diffscale.models.uvit import UViT

MODELS: dict[str, type[nn.Module]] = {
    "unet": UNet,
    "edm2": EDM2,
    "uvit": UViT,
    "rin": RIN,
    "dit": DiT,
    "jit": JiT,
    "hdit": HDiT,
}
