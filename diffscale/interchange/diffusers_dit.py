"""DiTTransformer2DModel of diffusers, which holds DiT's networks: its configuration and its names.

Names are those of diffusers 0.35 to 0.42. One constant is no configuration: `exported/dit_transformer.py` sets it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from diffscale.core.errors import UserError
from diffscale.models.dit import DiT

_FIXED: dict[str, Any] = {"mlp_ratio": 4.0, "positions": "fixed", "noise_input": "ddpm_index"}
"""Settings of a DiT that DiTTransformer2DModel has in this form alone."""
_BLOCK = {
    "out": "attn1.to_out.0",
    "mlp.fc1": "ff.net.0.proj",
    "mlp.fc2": "ff.net.2",
    "modulation": "norm1.linear",
}
_NOISE = {"linear1": "timestep_embedder.linear_1", "linear2": "timestep_embedder.linear_2"}
_OUTSIDE = {"embed_patches": "pos_embed.proj", "modulation": "proj_out_1", "head": "proj_out_2"}


def to_config(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the configuration of the DiTTransformer2DModel that computes what a DiT computes.

    Raises UserError that names the first setting which it does not have.

    settings: the keyword arguments that made the model
    """
    patch, resolution = settings["patch_size"], settings["resolution"]
    for name, value, holds, expected in (
        *((f"model.{name}", settings[name], settings[name] == value, f"{value}") for name, value in _FIXED.items()),
        ("data.resolution", resolution, resolution % patch == 0, f"a multiple of the patch's side, {patch}"),
        ("data.class_conditional", False, settings["num_classes"] > 0, "true"),
    ):
        if not holds:
            raise UserError(
                setting=name,
                value=value,
                expected=f"{expected} for diffusers' DiTTransformer2DModel",
                reason="that class has nothing else",
                fix="--to safetensors",
            )
    return {
        "_class_name": "DiT",
        "num_attention_heads": settings["num_heads"],
        "attention_head_dim": settings["width"] // settings["num_heads"],
        "in_channels": settings["channels"],
        "out_channels": settings["out_channels"] or settings["channels"],
        "num_layers": settings["depth"],
        "dropout": settings["dropout"],
        "sample_size": resolution,
        "patch_size": patch,
        "num_embeds_ada_norm": settings["num_classes"],
        "norm_eps": 1e-6,
    }


def to_state(model: DiT) -> dict[str, Tensor]:
    """Return the model's weights under the names of DiTTransformer2DModel, which has the embeddings in every block."""
    state, found = model.state_dict(), dict[str, Tensor]()
    for part in ("weight", "bias"):
        found |= {f"{theirs}.{part}": state[f"{ours}.{part}"] for ours, theirs in _OUTSIDE.items()}
        for number in range(len(model.blocks)):
            block = f"transformer_blocks.{number}"
            rows = state[f"blocks.{number}.qkv.{part}"].chunk(3)
            found |= {f"{block}.attn1.to_{name}.{part}": row for name, row in zip("qkv", rows, strict=True)}
            found |= {f"{block}.{theirs}.{part}": state[f"blocks.{number}.{o}.{part}"] for o, theirs in _BLOCK.items()}
            embedding = f"{block}.norm1.emb"
            found |= {f"{embedding}.{theirs}.{part}": state[f"embed_noise.{o}.{part}"] for o, theirs in _NOISE.items()}
            found[f"{embedding}.class_embedder.embedding_table.weight"] = state["embed_label.weight"]
    return found
