"""DiT's networks (Peebles and Xie 2023), as facebookresearch/DiT names their weights."""

from __future__ import annotations

from torch import Tensor, nn

from diffscale.interchange.renaming import Weights, by_rules, change, rename

_NAMES = by_rules(
    [
        (r"^x_embedder\.proj\.", "embed_patches."),
        (r"^t_embedder\.mlp\.0\.", "embed_noise.linear1."),
        (r"^t_embedder\.mlp\.2\.", "embed_noise.linear2."),
        (r"^y_embedder\.embedding_table\.", "embed_label."),
        (r"^pos_embed$", "positions"),
        (r"\.attn\.qkv\.", ".qkv."),
        (r"\.attn\.proj\.", ".out."),
        (r"^final_layer\.linear\.", "head."),
        (r"^final_layer\.adaLN_modulation\.1\.", "modulation."),
        (r"\.adaLN_modulation\.1\.", ".modulation."),
    ]
)
GIVEN = ("positions",)
"""What a file may lack: the table of positions follows from the size."""


def num_classes(tensors: dict[str, Tensor]) -> int:
    """Return the number of classes; the table has one more row, for no label."""
    found = tensors.get("y_embedder.embedding_table.weight")
    return 0 if found is None else found.shape[0] - 1


def convert(tensors: dict[str, Tensor], model: nn.Module, variant: str) -> Weights:
    """Return a file's weights under our names."""
    weights = rename(tensors.items(), _NAMES)
    change(weights, "positions", lambda t: t[0] if t.ndim == 3 else t)
    return weights
