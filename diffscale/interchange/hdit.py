"""HDiT's networks (Crowson et al. 2024), as crowsonkb/k-diffusion names their weights."""

from __future__ import annotations

import re

import torch
from torch import Tensor, nn

from diffscale.interchange.renaming import Weights, by_rules, change, rename

_NAMES = by_rules(
    [
        (r"^inner_model\.", ""),
        (r"^patch_in\.proj\.", "patch_in."),
        (r"^patch_out\.proj\.", "patch_out."),
        (r"^time_emb\.weight$", "embed_noise.frequencies"),
        (r"^time_in_proj\.", "noise_in."),
        (r"^aug_emb\.weight$", "augment_frequencies"),
        (r"^aug_in_proj\.", "augment_in."),
        (r"^class_emb\.", "embed_label."),
        (r"^mapping\.in_norm\.scale$", "mapping.gains.0"),
        (r"^mapping\.(blocks\.\d+)\.(up|down)_proj\.", r"mapping.\1.\2."),
        (r"^down_levels\.", "down."),
        (r"^up_levels\.", "up."),
        (r"^mid_level\.", "middle."),
        (r"\.self_attn\.norm\.linear\.", ".scale1."),
        (r"\.self_attn\.qkv_proj\.", ".qkv."),
        (r"\.self_attn\.scale$", ".sharpness"),
        (r"\.self_attn\.out_proj\.", ".out."),
        (r"\.ff\.norm\.linear\.", ".scale2."),
        (r"\.ff\.(up|down)_proj\.", r".mlp.\1."),
        (r"^(merges\.\d+)\.proj\.", r"\1."),
        (r"^(splits\.\d+)\.proj\.", r"\1.linear."),
        (r"^(splits\.\d+)\.fac$", r"\1.share"),
        (r"^out_norm\.scale$", "out_gain"),
    ]
)


def num_classes(tensors: dict[str, Tensor]) -> int:
    """Return the number of classes; the table has one more row, for no label."""
    found = next((t for name, t in tensors.items() if name.endswith("class_emb.weight")), None)
    return 0 if found is None else found.shape[0] - 1


def convert(tensors: dict[str, Tensor], model: nn.Module, variant: str) -> Weights:
    """Return a file's weights under our names.

    Their row for no label is learned and ours is zero: it is folded into `augment_in`, whose first half sees cosines of
    zero, which are 1. That is exact where augmentation labels are zero, as in sampling.
    """
    depth = len({found[0] for name in tensors if (found := re.search(r"mapping\.blocks\.\d+", name))})

    def name_of(name: str) -> str | None:
        if name.endswith("pos_emb.freqs"):
            return None
        found = re.search(r"mapping\.(?:blocks\.(\d+)\.norm|out_norm)\.scale$", name)
        if found is not None:
            return f"mapping.gains.{int(found[1]) + 1 if found[1] else depth + 1}"
        return _NAMES(name)

    weights = rename(tensors.items(), name_of)
    change(weights, "embed_noise.frequencies", lambda t: t[:, 0])
    if "embed_label.weight" in weights and "augment_in.weight" in weights:
        null = weights["embed_label.weight"].tensor[-1]
        change(weights, "embed_label.weight", lambda t: t[:-1] - null)
        change(weights, "augment_in.weight", lambda t: _plus_constant(t, null))
    return weights


def _plus_constant(weight: Tensor, vector: Tensor) -> Tensor:
    """Return the layer (D, D) whose output is larger by `vector` where the first half of its inputs is 1."""
    half = weight.shape[1] // 2
    share = (vector / half)[:, None].expand(-1, half)
    return weight + torch.cat([share, torch.zeros_like(share)], dim=1)
