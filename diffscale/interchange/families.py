"""The families of published weights: where their networks are in our recipes, how they are read, and their licences."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor, nn

from diffscale.core.errors import UserError
from diffscale.core.text import nearest
from diffscale.interchange import diffusers_unet, dit, edm, edm2, guided_diffusion, hdit, jit
from diffscale.interchange.renaming import RowOrder, Weights

OPEN = {"mit", "apache-2.0", "bsd-3-clause", "cc0-1.0", "cc-by-4.0", "cc-by-sa-4.0"}
"""Licences, as the hub names them, under which everyone may pass converted weights on."""


class Candidate(NamedTuple):
    """A network that a file of the family may hold."""

    recipe: str
    changes: tuple[str, ...] = ()  # of the recipe, as on the command line
    variant: str = ""  # for `convert`
    channels: int = 3  # of an image or latent


class Licence(NamedTuple):
    """Under which terms the authors publish the weights, as their repository says."""

    name: str
    may_be_passed_on: bool  # converted, under these terms
    of_project: bool = True  # whether the project has one licence; else the page of a model says it

    def of_page(self, licence: str) -> Licence:
        """Return the licence of a model whose page states `licence`, this one if the project has one for all."""
        return self if self.of_project or not licence else Licence(licence, licence in OPEN)


@dataclass(frozen=True)
class Family:
    """One project's way to store its networks."""

    name: str
    licence: Licence
    candidates: tuple[Candidate, ...]
    convert: Callable[[dict[str, Tensor], nn.Module, str], Weights]
    num_classes: Callable[[dict[str, Tensor]], int]
    parts: tuple[str, ...] = ()  # of a torch file that hold the weights, the preferred first
    given: tuple[str, ...] = ()  # weights that a file may lack
    settings: Callable[[dict[str, Any]], dict[str, Any]] | None = None  # of a run, from config.json, which it needs


def _guided(tensors: dict[str, Tensor], model: nn.Module, variant: str) -> Weights:
    order: RowOrder = "3 head d" if variant == "new" else "head 3 d"
    return guided_diffusion.convert(tensors, model, order)


def _torchcfm(tensors: dict[str, Tensor], model: nn.Module, variant: str) -> Weights:
    weights = _guided(tensors, model, variant)
    guided_diffusion.negate_output(weights)
    return weights


def _adm(size: int) -> Candidate:
    changes = (
        f"model.preset=adm-imagenet{size}",
        "model.noise_input=ddpm_index",
        "diffusion.schedule.name=ddpm_linear",
        f"data.resolution={size}",
    )
    return Candidate("adm-imagenet64", changes)


def _edm2_latents(size: str) -> Candidate:
    changes = (
        f"model.preset=edm2-imagenet512-{size}",
        "diffusion.schedule.p_mean=-0.4",
        "diffusion.schedule.p_std=1.0",
    )
    return Candidate("edm2-imagenet64-s", changes, channels=4)


def _diffusers(tensors: dict[str, Tensor], model: nn.Module, variant: str) -> Weights:
    return diffusers_unet.convert(tensors, model, swap_time=variant == "swap")


_NON_COMMERCIAL = Licence("CC BY-NC-SA 4.0 (NVIDIA)", may_be_passed_on=False)
_MIT = Licence("MIT", may_be_passed_on=True)

FAMILIES = {
    family.name: family
    for family in (
        Family(
            "edm",
            _NON_COMMERCIAL,
            (
                Candidate("edm-cifar10", variant="song"),
                Candidate("edm-cifar10", ("model.preset=edm-cifar10-ncsnpp",), "song"),
                Candidate("edm-ffhq64", variant="song"),
                Candidate("edm-ffhq64", ("model.preset=edm-ffhq64-ncsnpp",), "song"),
                Candidate("edm-imagenet64", variant="adm"),
            ),
            edm.convert,
            edm.num_classes,
        ),
        Family(
            "edm2",
            _NON_COMMERCIAL,
            (
                *(Candidate(f"edm2-imagenet64-{size}") for size in ("xs", "s", "m", "l", "xl")),
                *(_edm2_latents(size) for size in ("xxs", "xs", "s", "m", "l", "xl", "xxl")),
            ),
            edm2.convert,
            edm2.num_classes,
        ),
        Family(
            "adm",
            _MIT,
            (Candidate("adm-imagenet64", variant="new"), _adm(128), _adm(256), _adm(512)),
            _guided,
            guided_diffusion.num_classes,
        ),
        Family(
            "iddpm",
            _MIT,
            (Candidate("iddpm-cifar10"), Candidate("iddpm-imagenet64")),
            _guided,
            guided_diffusion.num_classes,
        ),
        Family(
            "torchcfm",
            _MIT,
            (Candidate("icfm-cifar10"),),
            _torchcfm,
            guided_diffusion.num_classes,
            parts=("ema_model", "net_model"),
        ),
        Family(
            "dit",
            Licence("CC BY-NC (Meta)", may_be_passed_on=False),
            tuple(
                Candidate("dit-xl-2", (f"model.preset=dit-{size}-{patch}", "model.noise_input=ddpm_index"), channels=4)
                for size in ("xl", "l", "b", "s")
                for patch in (2, 4, 8)
            ),
            dit.convert,
            dit.num_classes,
            parts=("ema", "model"),
            given=dit.GIVEN,
        ),
        Family(
            "jit",
            _MIT,
            (
                *(Candidate("jit-b-16", (f"model.preset=jit-{size}-16",)) for size in ("b", "l", "h")),
                *(Candidate("jit-b-32", (f"model.preset=jit-{size}-32",), "half") for size in ("b", "l", "h")),
            ),
            jit.convert,
            jit.num_classes,
            parts=("model_ema1", "model"),
            given=jit.GIVEN,
        ),
        Family(
            "hdit",
            Licence("as the file's author says (the code is MIT)", may_be_passed_on=False, of_project=False),
            (
                Candidate("hdit-imagenet128"),
                Candidate("hdit-imagenet128", ("model.preset=hdit-imagenet256", "data.resolution=256")),
                Candidate("hdit-imagenet128", ("model.preset=hdit-flowers256", "data.resolution=256")),
            ),
            hdit.convert,
            hdit.num_classes,
            parts=("model_ema", "model"),
        ),
        Family(
            "diffusers",
            Licence("as the model's page says", may_be_passed_on=False, of_project=False),
            (Candidate("ddpm-cifar10"),),
            _diffusers,
            diffusers_unet.num_classes,
            settings=diffusers_unet.run_settings,
        ),
    )
}


def family_of(name: str) -> Family:
    """Return a family by name. Raises UserError for an unknown one."""
    if name not in FAMILIES:
        raise UserError(setting="--family", value=name, expected=nearest(name, FAMILIES))
    return FAMILIES[name]
