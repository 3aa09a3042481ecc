"""What is needed of a feature network besides its layers."""

from __future__ import annotations

from typing import NamedTuple

from torch import nn

Channels = tuple[float, float, float]


class Network(NamedTuple):
    """model: images (B,3,size,size), normalised → features (B,dim). mean, std: of pixels in 0..1, for each channel.

    filter_name: how images reach `size` where the user does not say (see resize.FILTERS).
    """

    model: nn.Module
    dim: int
    size: int
    mean: Channels
    std: Channels
    filter_name: str = "antialiased_bilinear"
