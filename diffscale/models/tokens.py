"""Whether a network's tokens can carry what it has to predict of their patches."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

Settings = Mapping[str, Any]

CARRIED: Mapping[str, Callable[[Settings], tuple[int, int]]] = {
    "dit": lambda settings: (settings["patch_size"] ** 2, settings["width"]),
    "jit": lambda settings: (settings["patch_size"] ** 2, settings["bottleneck"]),
    "rin": lambda settings: (settings["patch_size"] ** 2, settings["interface_width"]),
    "hdit": lambda settings: (settings["patch_size"] ** 2, settings["widths"][0]),
    "uvit": lambda settings: (4 ** settings["patch_levels"], [*settings["conv_widths"], settings["width"]][0]),
}
"""By backbone that joins pixels before its first layer: the pixels of a patch, and the numbers of its token."""


def narrow_tokens(settings: Settings, channels: int) -> tuple[int, int] | None:
    """Return the numbers of a patch and of its token if the token is not wider, else None.

    Such tokens cannot carry the noise of all pixels of a patch, so networks that predict it, or v, end at a loss that
    no training lowers (Li & He, arXiv 2511.13720). Tokens exactly as wide are too narrow as well (suite narrow-tokens).
    Networks that predict x0 need no such width.

    settings: `name` and settings of the network
    channels: of an image
    """
    if settings["name"] not in CARRIED:
        return None
    pixels, token = CARRIED[settings["name"]](settings)
    return None if token > channels * pixels else (channels * pixels, token)
