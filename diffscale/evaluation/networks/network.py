"""A feature network with what an extractor must know about it."""

from __future__ import annotations

from typing import NamedTuple

from torch import nn

Channels = tuple[float, float, float]


class Network(NamedTuple):
    """A feature network, its input and its normalisation."""

    model: nn.Module  # images (B,3,size,size), normalised → features (B,dim)
    dim: int
    size: int  # side of the input in pixels
    mean: Channels  # of pixels in 0..1
    std: Channels
    filter_name: str = "antialiased_bilinear"  # default resize to `size` (see resize.FILTERS)
