"""Networks of the authors' code and ours, with the same weights, give the same outputs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from diffscale.interchange.families import FAMILIES
from diffscale.interchange.renaming import UnfitError, state_dict_for
from diffscale.models import create_model

from .authors import LAYOUTS, images, tensors_of

VARIANTS = {"3 head d": "new", "head 3 d": "legacy"}


def converted(layout: dict[str, Any], tensors: dict[str, Tensor]) -> nn.Module:
    family = FAMILIES[layout["family"]]
    model = create_model(**layout["model"])
    weights = family.convert(tensors, model, VARIANTS.get(layout["variant"], layout["variant"]))
    model.load_state_dict(state_dict_for(model, weights, family.given))
    return model.eval()


@pytest.mark.parametrize("name", LAYOUTS)
@torch.no_grad()
def test_the_output_is_that_of_the_authors_network(name: str):
    layout = LAYOUTS[name]
    tensors = tensors_of(layout)
    model = converted(layout, tensors)
    label = None if layout["label"] is None else torch.tensor(layout["label"])
    out = model(images(layout), torch.tensor(layout["logsnr"]), label)[0].flatten()
    expected = torch.tensor(layout["output"])
    torch.testing.assert_close(
        out[:: max(1, out.numel() // 48)][:48], expected, rtol=0, atol=1e-5 * float(out.abs().max())
    )
    classes = FAMILIES[layout["family"]].num_classes(tensors)
    assert classes == layout["model"].get("num_classes", 0)


@pytest.mark.parametrize("name", ["edm-ddpmpp", "adm-new", "dit"])
def test_the_first_weight_that_does_not_fit_is_named(name: str):
    layout = LAYOUTS[name]
    tensors = tensors_of(layout)
    first = next(iter(tensors))
    wrong = tensors | {first: tensors[first][:-1]}
    with pytest.raises(UnfitError, match=first):
        converted(layout, wrong)
    with pytest.raises(UnfitError, match="no such weight"):
        converted(layout, tensors | {"another.weight": torch.zeros(3)})
    with pytest.raises(UnfitError, match="the file lacks"):
        converted(layout, {n: t for n, t in tensors.items() if n != first})


@torch.no_grad()
def test_jits_weights_give_the_same_outputs():
    """In the layout of LTH14/JiT, whose code could not be run: names are from it, outputs those of our network."""
    settings = {"num_classes": 5, "patch_size": 4, "width": 32, "depth": 3, "num_heads": 2, "context_start": 1}
    model, again = (create_model("jit", resolution=16, **settings).eval() for _ in range(2))
    for parameter in model.parameters():
        parameter += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel()))
    state = model.state_dict()
    theirs = {
        f"net.{their_jit_name(name)}": t[None] if name in ("positions", "context") else t for name, t in state.items()
    }
    family = FAMILIES["jit"]
    again.load_state_dict(state_dict_for(again, family.convert(theirs, again, ""), family.given))
    inputs = torch.randn(2, 3, 16, 16), torch.tensor([-1.0, 2.0]), torch.tensor([1, 5])
    expected = model(*inputs)[0]
    assert float(expected.abs().max()) > 0.1
    torch.testing.assert_close(again(*inputs)[0], expected, rtol=0, atol=1e-5)
    half = state_dict_for(model, family.convert(theirs, model, "half"), family.given)
    torch.testing.assert_close(half["head.weight"] * 2, state["head.weight"])
    assert family.num_classes(theirs) == 5


def their_jit_name(name: str) -> str:
    inside = {"q_gain": "attn.q_norm.weight", "k_gain": "attn.k_norm.weight", "gain1": "norm1.weight"}
    inside |= {
        "gain2": "norm2.weight",
        "qkv": "attn.qkv",
        "out": "attn.proj",
        "gate_and_value": "mlp.w12",
        "down": "mlp.w3",
    }
    inside |= {"modulation": "adaLN_modulation.1"}
    outside = {"embed_patches": "x_embedder.proj1", "widen": "x_embedder.proj2", "positions": "pos_embed"}
    outside |= {"embed_noise.linear1": "t_embedder.mlp.0", "embed_noise.linear2": "t_embedder.mlp.2"}
    outside |= {
        "embed_label": "y_embedder.embedding_table",
        "context": "in_context_posemb",
        "head": "final_layer.linear",
    }
    outside |= {"out_gain": "final_layer.norm_final.weight", "modulation": "final_layer.adaLN_modulation.1"}
    place, table = ("", outside)
    if name.startswith("blocks."):
        _, number, name = name.split(".", 2)
        place, table = f"blocks.{number}.", inside
    for ours, theirs in table.items():
        if name == ours or name.startswith(f"{ours}."):
            return place + theirs + name[len(ours) :]
    raise AssertionError(name)
