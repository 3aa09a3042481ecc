"""EDM's networks (Karras et al. 2022): DDPM++ and NCSN++ of Song et al., and ADM, as NVlabs/edm names their weights."""

from __future__ import annotations

import math
import re

from torch import Tensor, nn

from diffscale.interchange.renaming import Weights, by_rules, change, flatten_attention, order_rows, rename, swap_halves

_INSIDE = {
    "norm0": "norm1",
    "conv0": "conv1",
    "affine": "embed",
    "norm1": "norm2",
    "conv1": "conv2",
    "skip": "shortcut",
    "norm2": "attention.norm",
    "qkv": "attention.qkv",
    "proj": "attention.out",
}
_OUTSIDE = by_rules(
    [
        (r"^map_layer0\.", "map1."),
        (r"^map_layer1\.", "map2."),
        (r"^map_label\.", "embed_label."),
        (r"^map_augment\.", "embed_augment."),
        (r"^map_noise\.freqs$", "embed_noise.frequencies"),
        (r"^out_norm\.", "head.norm."),
        (r"^out_conv\.", "head.conv."),
    ]
)
_FILTER = ".resample_filter"
"""Fixed filters, which ours makes itself."""


def num_classes(tensors: dict[str, Tensor]) -> int:
    """Return the number of classes of a file's network, 0 for an unconditional one."""
    found = tensors.get("model.map_label.weight")
    return 0 if found is None else found.shape[1]


def convert(tensors: dict[str, Tensor], model: nn.Module, variant: str) -> Weights:
    """Return a file's weights under our names.

    variant: "song" for DDPM++ and NCSN++, "adm" for the ImageNet network
    """
    names = [name.removeprefix("model.") for name in tensors if not name.endswith(_FILTER)]
    places = _places(names)

    def name_of(name: str) -> str | None:
        if name.endswith(_FILTER):
            return None
        name = name.removeprefix("model.")
        found = re.fullmatch(r"(enc|dec)\.([^.]+)\.(.+)", name)
        if found is None:
            return _OUTSIDE(name)
        place, rest = places[found[1], found[2]], found[3]
        part, _, last = rest.rpartition(".")
        return f"{place}.{_INSIDE.get(part, part)}.{last}" if part else f"{place}.{rest}"

    weights = rename(tensors.items(), name_of)
    flatten_attention(weights)
    order_rows(weights, model, "head d 3")
    if variant == "song":  # sines before cosines, and one-hot labels times √classes
        change(weights, "map1.weight", lambda t: swap_halves(t, 1))
        change(weights, "embed_augment.weight", swap_halves)
        change(weights, "embed_label.weight", lambda t: (swap_halves(t) * math.sqrt(t.shape[1])).T)
        change(weights, "embed_label.bias", swap_halves)
    else:
        change(weights, "embed_label.weight", lambda t: t.T)
    return weights


def _places(names: list[str]) -> dict[tuple[str, str], str]:
    """Return where each block of the encoder and decoder is in our network, by the order of the file."""
    places: dict[tuple[str, str], str] = {}
    counts = {"encoder": 0, "decoder": 0}
    for name in names:
        found = re.match(r"(enc|dec)\.([^.]+)\.", name)
        if found is None or (found[1], found[2]) in places:
            continue
        side, block = found[1], found[2]
        if side == "enc" and block.endswith("_conv"):
            place = "conv_in"
        elif block.endswith("_aux_residual"):
            place = f"pyramid_in.{counts['encoder'] - 1}.conv"
        elif block.endswith(("_aux_norm", "_aux_conv")):
            place = f"head.{block.rpartition('_')[2]}"
        elif block.endswith(("_in0", "_in1")):
            place = f"middle.{block[-1]}"
        else:
            ours = "encoder" if side == "enc" else "decoder"
            place = f"{ours}.{counts[ours]}"
            counts[ours] += 1
        places[side, block] = place
    return places
