"""JiT's networks (Li and He 2025), as LTH14/JiT names their weights."""

from __future__ import annotations

from torch import Tensor, nn

from diffscale.interchange.renaming import Weights, by_rules, change, rename

_NAMES = by_rules(
    [
        (r"^net\.", ""),
        (r"^x_embedder\.proj1\.", "embed_patches."),
        (r"^x_embedder\.proj2\.", "widen."),
        (r"^t_embedder\.mlp\.0\.", "embed_noise.linear1."),
        (r"^t_embedder\.mlp\.2\.", "embed_noise.linear2."),
        (r"^y_embedder\.embedding_table\.", "embed_label."),
        (r"^pos_embed$", "positions"),
        (r"^in_context_posemb$", "context"),
        (r"\.attn\.q_norm\.weight$", ".q_gain"),
        (r"\.attn\.k_norm\.weight$", ".k_gain"),
        (r"\.norm1\.weight$", ".gain1"),
        (r"\.norm2\.weight$", ".gain2"),
        (r"\.attn\.qkv\.", ".qkv."),
        (r"\.attn\.proj\.", ".out."),
        (r"\.mlp\.w12\.", ".gate_and_value."),
        (r"\.mlp\.w3\.", ".down."),
        (r"^final_layer\.norm_final\.weight$", "out_gain"),
        (r"^final_layer\.linear\.", "head."),
        (r"^final_layer\.adaLN_modulation\.1\.", "modulation."),
        (r"\.adaLN_modulation\.1\.", ".modulation."),
    ]
)
GIVEN = ("positions",)
"""What a file may lack: the table of positions follows from the size."""


def num_classes(tensors: dict[str, Tensor]) -> int:
    """Return the number of classes; the table has one more row, for no label."""
    found = next((t for name, t in tensors.items() if name.endswith("y_embedder.embedding_table.weight")), None)
    return 0 if found is None else found.shape[0] - 1


def convert(tensors: dict[str, Tensor], model: nn.Module, variant: str) -> Weights:
    """Return a file's weights under our names.

    variant: "half" for the networks of 512 pixels, whose noise has a standard deviation of 2: our process has images of
        half the size instead, so the output is halved
    """
    plain = {name: t for name, t in tensors.items() if "rope" not in name}
    weights = rename(plain.items(), _NAMES)
    for name in ("positions", "context"):
        change(weights, name, lambda t: t[0] if t.ndim == 3 else t)
    if variant == "half":
        for name in ("head.weight", "head.bias"):
            change(weights, name, lambda t: t / 2)
    return weights
