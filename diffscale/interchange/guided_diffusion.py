"""The UNet of improved-diffusion, guided-diffusion (ADM) and torchcfm, which name their weights alike."""

from __future__ import annotations

import re

from torch import Tensor, nn

from diffscale.interchange.renaming import RowOrder, Weights, by_rules, change, flatten_attention, order_rows, rename

_INSIDE = by_rules(
    [
        (r"^in_layers\.0\.", "norm1."),
        (r"^in_layers\.2\.", "conv1."),
        (r"^emb_layers\.1\.", "embed."),
        (r"^out_layers\.0\.", "norm2."),
        (r"^out_layers\.3\.", "conv2."),
        (r"^skip_connection\.", "shortcut."),
        (r"^proj_out\.", "out."),
        (r"^op\.", "conv."),
    ]
)
_OUTSIDE = by_rules(
    [
        (r"^time_embed\.0\.", "map1."),
        (r"^time_embed\.2\.", "map2."),
        (r"^label_emb\.", "embed_label."),
        (r"^out\.0\.", "head.norm."),
        (r"^out\.2\.", "head.conv."),
    ]
)
_ATTENTION = "attention"


def num_classes(tensors: dict[str, Tensor]) -> int:
    """Return the number of classes of a file's network, 0 for an unconditional one."""
    found = next((t for name, t in tensors.items() if name.endswith("label_emb.weight")), None)
    return 0 if found is None else found.shape[0]


def convert(tensors: dict[str, Tensor], model: nn.Module, order: RowOrder) -> Weights:
    """Return a file's weights under our names.

    order: of the rows of attentions; with `use_new_attention_order` it is 3 head d
    """
    places = _places([name.removeprefix("module.") for name in tensors])

    def name_of(name: str) -> str | None:
        name = name.removeprefix("module.")
        found = re.fullmatch(r"((?:input|output)_blocks\.\d+\.\d+|middle_block\.\d+)\.(.+)", name)
        return _OUTSIDE(name) if found is None else f"{places[found[1]]}.{_INSIDE(found[2])}"

    weights = rename(tensors.items(), name_of)
    flatten_attention(weights)
    order_rows(weights, model, order)
    return weights


def negate_output(weights: Weights) -> None:
    """Turn the sign of the network's output: torchcfm predicts the velocity towards the image."""
    for name in ("head.conv.weight", "head.conv.bias"):
        change(weights, name, lambda t: -t)


def _places(names: list[str]) -> dict[str, str]:
    """Return where each module of the input, middle and output blocks is in our network."""
    attends = {name.rpartition(".qkv.")[0] for name in names if ".qkv." in name}
    found = (re.match(r"(input|output)_blocks\.\d+\.\d+|middle_block\.\d+", name) for name in names)
    modules = {match[0] for match in found if match}
    places: dict[str, str] = {}
    decoder = -1
    for module in sorted(modules, key=lambda name: [int(part) for part in name.split(".")[1:]]):
        kind, first = module.split(".")[:2]
        if kind == "input_blocks":
            at = f"encoder.{int(first) - 1}"
            places[module] = "conv_in" if first == "0" else f"{at}.{_ATTENTION}" if module in attends else at
        elif kind == "middle_block":
            places[module] = {"0": "middle.0", "1": f"middle.0.{_ATTENTION}", "2": "middle.1"}.get(first, module)
        elif module in attends:
            places[module] = f"decoder.{decoder}.{_ATTENTION}"
        else:
            decoder += 1
            places[module] = f"decoder.{decoder}"
    return places
