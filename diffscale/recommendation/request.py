"""The request for a recommendation: the dataset, the compute, and how the search uses its share of it."""

from __future__ import annotations

from itertools import pairwise
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, field_validator

from diffscale.models.families import FAMILIES

Rate = Annotated[float, Field(gt=0, le=1e30)]


class Request(BaseModel):
    """The settings of a recommendation. Those of its runs are in `overrides`, over the preset `base`."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    name: str = Field(
        "recommend", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,49}$", description="what names of its runs begin with"
    )
    base: str = Field("emoji-base", description="preset or YAML file that every run starts from")
    overrides: dict[str, Any] = Field({}, description="dotted keys set in every run")
    flops: float = Field(gt=0, le=1e30, description="the whole compute C, search and final run")
    share: float = Field(0.1, gt=0, lt=1, description="part of C that the search may use")
    backbones: tuple[str, ...] = Field(("unet", "uvit", "dit"), min_length=1, description="backbones to compare")
    learning_rates: tuple[Rate, ...] = Field(
        (5e-4, 1e-3, 2e-3, 4e-3), min_length=1, description="tried for each backbone at its smallest budget"
    )
    budgets: int = Field(3, ge=3, le=8, description="number of iso-FLOP budgets")
    factor: float = Field(4.0, ge=1.5, le=100, description="ratio of one budget to the next")
    sizes: int = Field(5, ge=3, le=9, description="sizes at the smallest budget; three at each other one")
    seeds: int = Field(2, ge=1, le=100, description="training seeds of each size at the smallest budget")
    keep: int = Field(3, ge=1, le=100, description="fewest backbones that continue; of more, the worse half is dropped")
    schedules: tuple[str, ...] = Field((), description="noise schedules to try with the best network so far")
    resolutions: tuple[int, ...] = Field((), description="training resolutions to try, compared at data.resolution")
    guidance: tuple[str, ...] = Field((), description="guidances to try at the end: [1, '1.5,interval=-3:5']")
    solvers: tuple[str, ...] = Field((), description="solvers to try at the end: ['dpmpp_2m,steps=10', 'heun,steps=9']")
    max_concurrent: int = Field(1, ge=1, le=10**4, description="runs at a time")

    @field_validator("guidance", mode="before")
    @classmethod
    def _as_text(cls, guidance: Any) -> Any:
        return [str(value) for value in guidance] if isinstance(guidance, list | tuple) else guidance

    @field_validator("backbones")
    @classmethod
    def _known(cls, backbones: tuple[str, ...]) -> tuple[str, ...]:
        unknown = [name for name in backbones if name not in FAMILIES]
        if unknown:
            raise ValueError(f"backbones of {', '.join(FAMILIES)}, not {unknown[0]}")
        if len(set(backbones)) < len(backbones):
            raise ValueError("each backbone once")
        return backbones

    @field_validator("learning_rates")
    @classmethod
    def _increasing(cls, rates: tuple[float, ...]) -> tuple[float, ...]:
        if any(a >= b for a, b in pairwise(rates)):
            raise ValueError("increasing learning rates")
        return rates
