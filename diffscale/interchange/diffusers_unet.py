"""UNet2DModel of diffusers, which holds DDPM's and ADM's networks exactly: its configuration and its names, both ways.

Names of the configuration and of the weights are those of diffusers 0.35 to 0.42. diffusers itself is not needed.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from diffscale.core.errors import UserError
from diffscale.core.text import one_line
from diffscale.interchange.renaming import Renamed, Weights, change, flatten_attention, swap_halves
from diffscale.models.layers import SelfAttention2d
from diffscale.models.unet import UNet

GROUPS = 32
_OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
_INSIDE = {
    "norm1": "norm1",
    "conv1": "conv1",
    "embed": "time_emb_proj",
    "norm2": "norm2",
    "conv2": "conv2",
    "shortcut": "conv_shortcut",
    "conv": "conv",
}
_OUTSIDE = {
    "conv_in": "conv_in",
    "map1": "time_embedding.linear_1",
    "map2": "time_embedding.linear_2",
    "head.norm": "conv_norm_out",
    "head.conv": "conv_out",
}
_FIXED: dict[str, Any] = {
    "skips": True,
    "residual": True,
    "residual_scale": 1.0,
    "norm": "group",
    "stem_channels": 0,
    "decoder_attention": "all",
    "middle_attention": True,
    "resample_filter": (1, 1),
    "resample_projection": False,
    "input_pyramid": "none",
    "output_pyramid": False,
    "noise_mult": 1,
    "embedding_mult": 4,
    "label_joins": "mapped",
    "augment_dim": 0,
    "image_channels": 0,
}
"""Settings of a UNet that UNet2DModel has in this form alone."""


def to_config(model: UNet, settings: Mapping[str, Any], resolution: int, channels: int) -> dict[str, Any]:
    """Return the configuration of the UNet2DModel that computes what `model` computes.

    Raises UserError that names the first setting which UNet2DModel does not have.

    settings: the keyword arguments that made the model
    """
    for name, value in _FIXED.items():
        found = settings[name]
        if (tuple(found) if isinstance(found, list | tuple) else found) != value:
            raise _not_in_diffusers(f"model.{name}", found, f"{value}")
    widths = [int(settings["model_channels"] * m) for m in settings["channel_mult"]]
    if any(width % GROUPS or width < 4 * GROUPS for width in widths):
        raise _not_in_diffusers("model.channel_mult", widths, "widths of 128 or more that divide by 32, its groups")
    if settings["noise_embedding"] == "fourier":
        raise _not_in_diffusers("model.noise_embedding", "fourier", "sinusoidal or sinusoidal_endpoint")
    conv, levels = settings["resample"] == "conv", _attending_levels(model, settings)
    kinds = [("Attn" if attends else "" if conv else "Resnet") for attends in levels]
    names = [
        {"Attn": "AttnDownBlock2D", "": "DownBlock2D", "Resnet": "ResnetDownsampleBlock2D"}[kind] for kind in kinds
    ]
    config: dict[str, Any] = {
        "_class_name": "UNet2DModel",
        "sample_size": resolution,
        "in_channels": channels,
        "out_channels": settings["out_channels"] or channels,
        "block_out_channels": widths,
        "layers_per_block": settings["num_blocks"],
        "down_block_types": names,
        "up_block_types": [n.replace("Downsample", "Upsample").replace("Down", "Up") for n in reversed(names)],
        "flip_sin_to_cos": True,
        "freq_shift": 1 if settings["noise_embedding"] == "sinusoidal_endpoint" else 0,
        "norm_eps": settings["norm_eps"],
        "dropout": settings["dropout"],
        "downsample_padding": 0 if settings["resample_padding"] == "end" else 1,
        "resnet_time_scale_shift": "scale_shift" if settings["adaptive_scale"] else "default",
        "attention_head_dim": _head_width(model),
        "attn_norm_num_groups": GROUPS,
    }
    if not conv:
        config |= {"downsample_type": "resnet", "upsample_type": "resnet"}
    if model.num_classes:
        config["num_class_embeds"] = model.num_classes + 1
    return config


def to_state(model: UNet) -> dict[str, Tensor]:
    """Return the model's weights under the names of UNet2DModel."""
    state = model.state_dict()
    found: dict[str, Tensor] = {}
    for ours, theirs, kind in _places(model):
        if kind == "attention":
            for part in ("weight", "bias"):
                found |= dict(
                    zip((f"{theirs}.to_{n}.{part}" for n in "qkv"), state[f"{ours}.qkv.{part}"].chunk(3), strict=True)
                )
                found[f"{theirs}.to_out.0.{part}"] = state[f"{ours}.out.{part}"]
                found[f"{theirs}.group_norm.{part}"] = state[f"{ours}.norm.{part}"]
            continue
        for part in ("weight", "bias"):
            found[f"{theirs}.{part}"] = state[f"{ours}.{part}"]
    if model.embed_label is not None:
        table = state["embed_label.weight"]
        found["class_embedding.weight"] = torch.cat([table, torch.zeros_like(table[:1])])
    return {name: tensor.detach().clone().contiguous() for name, tensor in found.items()}


def from_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the `model` settings of a UNet2DModel's configuration.

    Raises UserError for another class, or for what our UNet does not have.
    """
    if config.get("_class_name") != "UNet2DModel":
        raise _not_ours("_class_name", config.get("_class_name"), "UNet2DModel")
    for name, valid in (("time_embedding_type", "positional"), ("act_fn", "silu"), ("norm_num_groups", GROUPS)):
        if config.get(name, valid) != valid:
            raise _not_ours(name, config[name], str(valid))
    widths, down = list(config["block_out_channels"]), list(config["down_block_types"])
    known = {"DownBlock2D", "AttnDownBlock2D", "ResnetDownsampleBlock2D"}
    if unknown := set(down) - known:
        raise _not_ours("down_block_types", sorted(unknown)[0], ", ".join(sorted(known)))
    head = config.get("attention_head_dim", 8)
    side = int(config.get("sample_size") or 32)
    settings: dict[str, Any] = {
        "name": "unet",
        "model_channels": widths[0],
        "channel_mult": [width / widths[0] for width in widths],
        "num_blocks": config.get("layers_per_block", 2),
        "attn_resolutions": [side // 2**level for level, kind in enumerate(down) if kind.startswith("Attn")],
        "adaptive_scale": config.get("resnet_time_scale_shift", "default") == "scale_shift",
        "resample": "block" if config.get("downsample_type", "conv") == "resnet" else "conv",
        "resample_padding": "end" if config.get("downsample_padding", 1) == 0 else "both",
        "norm_eps": config.get("norm_eps", 1e-5),
        "noise_embedding": "sinusoidal_endpoint" if config.get("freq_shift", 0) == 1 else "sinusoidal",
        "noise_input": "ddpm_index",
        "dropout": config.get("dropout", 0.0),
        "out_channels": 0 if config["out_channels"] == config["in_channels"] else config["out_channels"],
    }
    return settings | ({"num_heads": 1} if head is None else {"num_heads": 0, "channels_per_head": head})


def run_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a run that a configuration determines. Raises UserError as `from_config` does."""
    if not config:
        raise UserError(setting="FILE", value="", expected="a folder with config.json and its safetensors")
    try:
        return {"model": from_config(config), "data": {"resolution": int(config.get("sample_size") or 32)}}
    except (KeyError, TypeError, ValueError, ZeroDivisionError, IndexError) as error:
        if isinstance(error, UserError):
            raise
        raise _not_ours("configuration", one_line(error), "that of a UNet2DModel") from None


def num_classes(tensors: Mapping[str, Tensor]) -> int:
    """Return the number of classes; diffusers' table has one more row, for no label."""
    found = tensors.get("class_embedding.weight")
    return 0 if found is None else found.shape[0] - 1


def convert(tensors: Mapping[str, Tensor], model: nn.Module, swap_time: bool) -> Weights:
    """Return a UNet2DModel's weights under our names.

    swap_time: whether the network embeds sines before cosines (`flip_sin_to_cos` is false)
    """
    if not isinstance(model, UNet):
        raise TypeError(f"a UNet2DModel is a unet, not {type(model).__name__}")
    given = {_modern(name): Renamed(name, tensor) for name, tensor in tensors.items()}
    weights: Weights = {}
    for ours, theirs, kind in _places(model):
        for part in ("weight", "bias"):
            if kind == "attention":
                rows = [given.pop(f"{theirs}.to_{n}.{part}", None) for n in "qkv"]
                if all(rows):
                    weights[f"{ours}.qkv.{part}"] = Renamed(rows[0].source, torch.cat([r.tensor for r in rows if r]))  # type: ignore[union-attr]
                for inner, name in (("norm", "group_norm"), ("out", "to_out.0")):
                    _move(given, f"{theirs}.{name}.{part}", weights, f"{ours}.{inner}.{part}")
            else:
                _move(given, f"{theirs}.{part}", weights, f"{ours}.{part}")
    _move(given, "class_embedding.weight", weights, "embed_label.weight")
    change(weights, "embed_label.weight", lambda t: t[:-1] - t[-1])
    flatten_attention(weights)
    if swap_time:
        change(weights, "map1.weight", lambda t: swap_halves(t, 1))
    return weights | given  # what is left has no place in our network, and the check of the names says so


def _move(given: dict[str, Renamed], theirs: str, weights: Weights, ours: str) -> None:
    if theirs in given:
        weights[ours] = given.pop(theirs)


def _modern(name: str) -> str:
    """Return the name that diffusers has given to a weight of an attention since 0.13."""
    return re.sub(r"\.(query|key|value|proj_attn)\.", lambda found: f".{_OLD_ATTENTION[found[1]]}.", name)


def _places(model: UNet) -> Iterator[tuple[str, str, str]]:
    """Yield (our module, theirs, kind) for every layer with a weight and a bias; an attention is one."""
    for ours, theirs in _OUTSIDE.items():
        yield ours, theirs, "layer"
    for ours, theirs, module in _blocks(model):
        for name, inner in module.named_children():
            if name in _INSIDE and next(inner.parameters(), None) is not None:
                yield f"{ours}.{name}", f"{theirs}.{_INSIDE[name]}", "layer"
        if isinstance(getattr(module, "attention", None), SelfAttention2d):
            yield f"{ours}.attention", re.sub(r"\.resnets\.(\d+)$", r".attentions.\1", theirs), "attention"


def _blocks(model: UNet) -> Iterator[tuple[str, str, nn.Module]]:
    """Yield (our name, theirs, module) of the blocks. Our lists have a resampler wherever the level changes."""
    for side, ours, sampler in (("down", "encoder", "downsamplers"), ("up", "decoder", "upsamplers")):
        level, index = 0, 0
        for number, block in enumerate(getattr(model, ours)):
            if _resamples(block):
                yield f"{ours}.{number}", f"{side}_blocks.{level}.{sampler}.0", block
                level, index = level + 1, 0
            else:
                yield f"{ours}.{number}", f"{side}_blocks.{level}.resnets.{index}", block
                index += 1
    for number, block in enumerate(model.middle):
        yield f"middle.{number}", f"mid_block.resnets.{number}", block


def _resamples(block: nn.Module) -> bool:
    resample = getattr(block, "resample", None)
    return resample is None or resample.mode != "keep"


def _attending_levels(model: UNet, settings: Mapping[str, Any]) -> list[bool]:
    """Return whether each level has attention."""
    found, level = [False] * len(settings["channel_mult"]), 0
    for block in model.encoder:
        level += _resamples(block)
        found[level] |= getattr(block, "attention", None) is not None
    return found


def _head_width(model: UNet) -> int | None:
    """Return the width of every head, None if every attention has one head. Raises UserError if they differ."""
    attentions = [module for module in model.modules() if isinstance(module, SelfAttention2d)]
    if all(attention.heads == 1 for attention in attentions):
        return None
    widths = {attention.out.in_features // attention.heads for attention in attentions}
    if len(widths) > 1:
        raise _not_in_diffusers("model.num_heads", sorted(widths), "heads of one width, or one head")
    return widths.pop()


def _not_in_diffusers(setting: str, value: object, expected: str) -> UserError:
    return UserError(
        setting=setting,
        value=value,
        expected=f"{expected} for --to diffusers",
        reason="diffusers' UNet2DModel has nothing else",
        fix="--to safetensors",
    )


def _not_ours(setting: str, value: object, expected: str) -> UserError:
    return UserError(setting=f"config.json: {setting}", value=value, expected=expected, reason="unet has nothing else")
