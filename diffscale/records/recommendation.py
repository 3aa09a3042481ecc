"""A recommendation: what was searched, what it predicts, and what came true. One JSON file, which a report reads."""

from __future__ import annotations

import json

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from diffscale.core import storage
from diffscale.core.errors import UserError
from diffscale.core.text import first_line

FILE = "recommendation.json"


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, ser_json_inf_nan="strings")


class Point(_Part):
    """The end of one run of the search."""

    run_id: str
    run_name: str
    rung: int = Field(description="size in the ladder of its backbone (models/families.py)")
    seed: int
    budget: int = Field(description="number of its budget, the smallest is 0")
    parameters: int
    images: int
    flops: float
    flops_per_image: float
    device_seconds: float
    val_loss: float
    distance: float


class Searched(_Part):
    """The search of one backbone."""

    backbone: str
    learning_rates: dict[str, float | None] = Field(description="validation loss of the pilot by learning rate")
    learning_rate: float = Field(description="that of the largest budget")
    budget_rates: tuple[float, ...] = Field((), description="learning rate of all sizes at each budget")
    at_edge: str = Field("", description="on which side the best learning rate of the pilot has no neighbour")
    dropped_after: int | None = Field(None, description="budget after which the backbone was dropped")
    points: tuple[Point, ...]


class Prediction(_Part):
    """A value with its 95 % interval."""

    value: float
    low: float
    high: float

    @property
    def numbers(self) -> tuple[float, float, float]:
        """The value and the ends of its interval."""
        return self.value, self.low, self.high

    def __str__(self) -> str:
        return f"{self.value:.4g} [{self.low:.4g}, {self.high:.4g}]"


class Recipe(_Part):
    """What to train, and what it is predicted to give."""

    backbone: str
    rung: int
    parameters: int
    learning_rate: float | None = Field(None, description="None in older recommendations: that of the largest budget")
    flops: float = Field(description="training FLOPs that the search left")
    images: int
    epochs: float
    parameters_best: Prediction = Field(description="the law's best number of parameters")
    images_best: Prediction = Field(description="the images that this size sees")
    val_loss: Prediction
    distance: Prediction | None = Field(description="None with distances at fewer than three budgets")
    device_seconds: float = Field(description="at the speed of the search's largest run of the backbone")
    cost: float | None = Field(description="device-hours times the price in the settings")
    others: dict[str, Prediction] = Field(description="predicted loss of the best size of each other backbone")
    why: tuple[str, ...]
    caveats: tuple[str, ...]


class SamplingChoice(_Part):
    """The solver and guidance with the lowest distance to held-out images, of those requested."""

    solver: str = Field("", description="as requested: heun,steps=18; empty: that of the settings")
    guidance: str = Field(description="as requested: a scale, or 1.5,interval=-3:5; empty: that of the settings")
    heldout: dict[str, float | None] = Field(description="distance to held-out images by solver and guidance")
    distance: float = Field(description="that of the choice to the training images")
    nfe: int
    sampling_flops: float = Field(description="FLOPs to generate one image")

    def __str__(self) -> str:
        return " and ".join(filter(None, [self.solver, self.guidance and f"guidance {self.guidance}"]))


class Outcome(_Part):
    """What training the recipe gave."""

    run_id: str
    images: int
    flops: float
    device_seconds: float
    val_loss: float
    distance: float
    distance_low: float | None
    distance_high: float | None
    guidance: SamplingChoice | None = Field(None, description="how to sample")


class Recommendation(_Part):
    """A finished search, its recipe, and once it was trained its outcome."""

    schema_version: int = 1
    name: str
    dataset: str
    dataset_hash: str
    resolution: int
    metric: str = Field(description="name of the distance")
    flops: float = Field(description="the whole budget C")
    share: float = Field(description="part of C that the search was allowed")
    search_flops: float = Field(description="what the search used")
    budgets: tuple[float, ...]
    searched: tuple[Searched, ...]
    alternatives: dict[str, float | None] = Field({}, description="distance by schedule and training resolution")
    chosen: str = Field("", description="the best of the alternatives")
    recipe: Recipe
    outcome: Outcome | None = None


def write_recommendation(folder: str, found: Recommendation) -> str:
    """Write the recommendation into its folder and return its URI."""
    uri = storage.join(folder, FILE)
    storage.write_bytes(uri, json.dumps(json.loads(found.model_dump_json()), indent=1).encode())
    return uri


def read_recommendations(places: list[str]) -> list[Recommendation]:
    """Return the recommendations in these folders, their sub-folders included. Raises UserError for a damaged one."""
    found = []
    for place in places:
        place = storage.check_absolute(place, "RUNS")
        if place.endswith((".json", ".jsonl")):
            continue
        for file in [f for f in storage.list_files(place, recursive=True) if f.endswith(f"/{FILE}")]:
            try:
                found.append(Recommendation.model_validate_json(storage.read_bytes(file)))
            except ValidationError as error:
                raise UserError(
                    setting="RUNS", value=file, expected="a recommendation of diffscale", reason=first_line(error)
                ) from None
    return found
