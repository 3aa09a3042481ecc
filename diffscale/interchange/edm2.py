"""EDM2's networks (Karras et al. 2024), as NVlabs/edm2 names their weights."""

from __future__ import annotations

import re

from torch import Tensor, nn

from diffscale.interchange.renaming import Weights, by_rules, order_rows, rename

_INSIDE = {
    "emb_gain": "embed_gain",
    "conv_res0.weight": "conv1.weight",
    "emb_linear.weight": "embed.weight",
    "conv_res1.weight": "conv2.weight",
    "conv_skip.weight": "shortcut.weight",
    "attn_qkv.weight": "qkv.weight",
    "attn_proj.weight": "out.weight",
}
_OUTSIDE = by_rules(
    [
        (r"^logvar_fourier\.", "uncertainty.fourier."),
        (r"^logvar_linear\.", "uncertainty.linear."),
        (r"^unet\.", ""),
        (r"^emb_fourier\.", "fourier."),
        (r"^emb_noise\.", "embed_noise."),
        (r"^emb_label\.", "embed_label."),
        (r"^out_conv\.", "conv_out."),
        (r"fourier\.freqs$", "fourier.frequencies"),
    ]
)


def num_classes(tensors: dict[str, Tensor]) -> int:
    """Return the number of classes of a file's network, 0 for an unconditional one."""
    found = tensors.get("unet.emb_label.weight")
    return 0 if found is None else found.shape[1]


def convert(tensors: dict[str, Tensor], model: nn.Module, variant: str) -> Weights:
    """Return a file's weights, which are stored before normalisation as ours are, under our names."""
    places: dict[tuple[str, str], str] = {}
    counts = {"enc": 0, "dec": 0}

    def name_of(name: str) -> str | None:
        if name.endswith(".resample_filter"):
            return None
        found = re.fullmatch(r"unet\.(enc|dec)\.([^.]+)\.(.+)", name)
        if found is None:
            return _OUTSIDE(name)
        side, block, rest = found.groups()
        if side == "enc" and block.endswith("_conv"):
            return f"conv_in.{rest}"
        if (side, block) not in places:
            places[side, block] = f"{'encoder' if side == 'enc' else 'decoder'}.{counts[side]}"
            counts[side] += 1
        return f"{places[side, block]}.{_INSIDE.get(rest, rest)}"

    weights = rename(tensors.items(), name_of)
    order_rows(weights, model, "head d 3")
    return weights
