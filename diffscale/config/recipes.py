"""Recipes: presets that train what a paper trained, with what the paper reports and what training costs.

A preset whose file has the section `recipe` is one. Hours and price are computed from the counted FLOPs with a stated,
assumed utilisation of one H200 and a stated, assumed price of an hour.
"""

from __future__ import annotations

import re
from fnmatch import fnmatch

from pydantic import BaseModel, ConfigDict, ValidationError

from diffscale.config.experiment import Experiment
from diffscale.config.load import load_tree, preset_names, read_tree
from diffscale.core.errors import UserError
from diffscale.core.text import one_line

H200_BF16 = 989e12
"""Peak FLOP/s of an H200 in dense bf16 matrix products (NVIDIA's data sheet)."""
FLOPS_OFF = 0.02
"""Share by which the FLOPs of changed settings may differ before the recipe's costs are said not to hold."""


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class PublishedFid(_Part):
    """One FID that a paper reports."""

    value: float
    sampler: str
    n: int  # generated images
    note: str = ""


class Rental(_Part):
    """What training costs on one H200, under two assumptions."""

    hours: float
    mfu: float  # assumed share of the peak in bf16
    usd: float
    usd_per_hour: float  # assumed


class Recipe(_Part):
    """What the section `recipe` of a preset says."""

    paper: str
    data: str
    fid: tuple[PublishedFid, ...]
    flops: float  # of the whole training, counted
    h200: Rental
    differs: tuple[str, ...]  # from the paper

    def lines(self) -> list[str]:
        """Return the recipe as lines of text."""
        r = self.h200
        lines = [f"paper        {self.paper}", f"data         {self.data}"]
        for fid in self.fid:
            note = f" ({fid.note})" if fid.note else ""
            lines.append(f"published    FID {fid.value:g}, {fid.sampler}, n = {fid.n:,}{note}")
        if not self.fid:
            lines.append("published    no FID for this configuration")
        lines.append(
            f"costs        {self.flops:.3g} FLOPs = {r.hours:,g} hours of one H200 at an assumed MFU of {r.mfu:.0%}"
            f" = {r.usd:,g} USD at an assumed {r.usd_per_hour:g} USD an hour"
        )
        return lines + [f"differs      {what}" for what in self.differs or ("in nothing that is known",)]


def rental(flops: float, mfu: float = 0.3, usd_per_hour: float = 3.0) -> Rental:
    """Return the cost of FLOPs on one H200, to three digits."""
    hours = flops / (H200_BF16 * mfu) / 3600
    return Rental(hours=_rounded(hours), mfu=mfu, usd=_rounded(hours * usd_per_hour), usd_per_hour=usd_per_hour)


def recipe_of(preset_or_file: str) -> Recipe | None:
    """Return the recipe of a preset or a file of settings, None if it is none. Raises UserError for a wrong section."""
    section = read_tree(preset_or_file).get("recipe")
    if section is None:
        return None
    try:
        return Recipe.model_validate(section)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(["recipe", *map(str, first["loc"])])
        raise UserError(setting=key, value=first["input"], expected=one_line(first["msg"])) from None


def recipes() -> dict[str, Recipe]:
    """Return the recipes of the package by name."""
    found = {name: recipe_of(name) for name in preset_names()}
    return {name: recipe for name, recipe in found.items() if recipe is not None}


def describe(preset_or_file: str, experiment: Experiment, flops: float | None) -> list[str]:
    """Return lines about the recipe of a run's preset: what it is, and which settings are other than the recipe's.

    experiment: the run's settings
    flops: of the whole run, None if its budget is not one of images or FLOPs
    """
    recipe = recipe_of(preset_or_file)
    if recipe is None:
        return []
    lines = recipe.lines()
    if flops is not None and abs(flops / recipe.flops - 1) > FLOPS_OFF:
        lines.append(f"changed      this run takes {flops:.3g} FLOPs, not the recipe's {recipe.flops:.3g}")
    return [f"recipe       {preset_or_file}, for {experiment.name}", *lines]


def recipes_table(pattern: str = "*") -> str:
    """Return the recipes whose name matches a shell pattern as a Markdown table."""
    lines = [
        "| recipe | paper | data | images | FLOPs | H200 hours | USD | published FID |",
        "| --- | --- | --- | ---: | ---: | ---: | ---: | --- |",
    ]
    for name, recipe in recipes().items():
        if not fnmatch(name, pattern):
            continue
        images = load_tree(name)["train"]["images"]
        fid = "; ".join(f"{f.value:g} ({f.sampler}, n = {f.n:,})" for f in recipe.fid) or "none"
        paper = re.sub(r"(\d{4}).*", r"\1", recipe.paper)
        lines.append(
            f"| `{name}` | {paper} | {recipe.data} | {images:,} | {recipe.flops:.3g} | {recipe.h200.hours:,g} "
            f"| {recipe.h200.usd:,g} | {fid} |"
        )
    return "\n".join(lines)


def recipes_text(pattern: str = "*") -> str:
    """Return all that recipes say whose name matches a shell pattern, a paragraph each."""
    found = {name: recipe for name, recipe in recipes().items() if fnmatch(name, pattern)}
    return "\n\n".join("\n  ".join([name, *recipe.lines()]) for name, recipe in found.items())


def _rounded(value: float) -> float:
    return float(f"{value:.3g}")
