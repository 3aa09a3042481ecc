"""What can be done with each preset network: train it, begin at published weights, hand it on."""

from __future__ import annotations

import inspect
from functools import cache
from typing import Any, NamedTuple

import torch

from diffscale.config.load import parse_overrides, read_tree
from diffscale.core.errors import UserError
from diffscale.interchange import diffusers_dit, diffusers_unet
from diffscale.interchange.families import FAMILIES
from diffscale.models import MODELS, PRESETS, create_model
from diffscale.models.unet import UNet

TRIED_WHOLE = 140_000_000
"""Parameters up to which a test makes a step of the whole network; of larger ones it takes a narrow one."""


class Support(NamedTuple):
    """Cells of the table of presets."""

    trains: str
    weights_in: str
    export: str


def support(name: str, parameters: int) -> Support:
    """Return what can be done with a preset network that has so many parameters."""
    settings = settings_of(name)
    kind = _class_of(name, settings)
    families = [family for family, presets in _published().items() if name in presets]
    families += ["diffusers"] if kind == "UNet2DModel" and "diffusers" not in families else []
    trains = "yes" if parameters <= TRIED_WHOLE else "yes, narrow"
    return Support("no" if settings.get("image_channels") else trains, ", ".join(families) or "none", kind)


def settings_of(name: str) -> dict[str, Any]:
    """Return all keyword arguments that make a preset network, but for its `name`."""
    preset = dict(PRESETS[name])
    parameters = inspect.signature(MODELS[preset.pop("name")]).parameters.values()
    return {p.name: p.default for p in parameters if p.default is not inspect.Parameter.empty} | preset


def _class_of(name: str, settings: dict[str, Any]) -> str:
    """Return the class of diffusers that holds a network exactly in a process of numbered steps, else "own code"."""
    with torch.device("meta"):
        model = create_model(name)
    try:
        if isinstance(model, UNet) and settings["noise_input"] != "edm":
            diffusers_unet.to_config(model, settings, settings["resolution"], settings["channels"])
            return "UNet2DModel"
        if PRESETS[name]["name"] == "dit":
            diffusers_dit.to_config(settings | {"noise_input": "ddpm_index"})
            return "DiTTransformer2DModel"
    except UserError:
        pass
    return "own code"


@cache
def _published() -> dict[str, set[str]]:
    """Return the presets whose published weights each family takes."""
    found: dict[str, set[str]] = {}
    for family in FAMILIES.values():
        for candidate in family.candidates:
            changed = parse_overrides(candidate.changes).get("model", {}).get("preset")
            found.setdefault(family.name, set()).add(changed or _network_of(candidate.recipe))
    return found


def _network_of(recipe: str) -> str:
    """Return the preset network of a recipe, empty if it describes its network itself."""
    tree = read_tree(recipe)
    preset = tree.get("model", {}).get("preset", "")
    return preset if preset or "base" not in tree else _network_of(tree["base"])
