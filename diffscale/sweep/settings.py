"""The typed settings of a sweep file."""

from __future__ import annotations

from itertools import pairwise
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from diffscale.core.ranges import Images

Amount = Annotated[float, Field(gt=0, le=1e30)]


class Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Dimension(Part):
    """The values of one dotted key, given in exactly one of the four ways. A plain list is short for `grid`."""

    grid: list[Any] | None = Field(None, min_length=1, description="every value")
    choice: list[Any] | None = Field(None, min_length=1, description="one of them, drawn")
    uniform: tuple[float, float] | None = Field(None, description="drawn between the two")
    loguniform: tuple[float, float] | None = Field(None, description="drawn between the two, evenly in the logarithm")

    @model_validator(mode="after")
    def _one(self) -> Dimension:
        given = [k for k in ("grid", "choice", "uniform", "loguniform") if getattr(self, k) is not None]
        if len(given) != 1:
            raise ValueError("exactly one of grid, choice, uniform, loguniform")
        ends = self.uniform or self.loguniform
        if ends and not ends[0] < ends[1]:
            raise ValueError(f"{given[0]} needs its lower end first")
        if self.loguniform and self.loguniform[0] <= 0:
            raise ValueError("loguniform needs ends above 0")
        return self


class Search(Part):
    name: Literal["grid", "random", "tpe"] = Field("grid", description="how points are chosen")
    samples: int = Field(
        1, ge=1, le=10**5, description="draws of the random dimensions for each grid point; for tpe all trials"
    )
    seed: int = Field(0, ge=0, le=2**31 - 1, description="seed of the draws")


class Scheduler(Part):
    """Early stopping. Rungs are training FLOPs, so that trials are compared at equal compute."""

    name: Literal["none", "halving", "asha"] = Field("none", description="rule by which trials end early")
    rungs_flops: tuple[Amount, ...] = Field((), description="increasing; the last one ends a trial")
    reduction: float = Field(2.0, gt=1, le=1e6, description="one in `reduction` trials continues from each rung")

    @model_validator(mode="after")
    def _rungs(self) -> Scheduler:
        rungs = self.rungs_flops
        if self.name != "none" and not rungs:
            raise ValueError(f"{self.name} needs scheduler.rungs_flops")
        if any(a >= b for a, b in pairwise(rungs)):
            raise ValueError("scheduler.rungs_flops must increase")
        return self


class Budget(Part):
    """Limits of a trial (it ends there) or of the whole sweep (no further trial is started)."""

    flops: Amount | None = Field(None, description="training FLOPs")
    images: Images | None = Field(None, description="training images")
    device_seconds: Amount | None = Field(None, description="seconds times devices")
    money: Amount | None = Field(None, description="needs train.price_per_device_hour")


class Budgets(Part):
    trial: Budget = Budget()
    total: Budget = Budget()


class Sweep(Part):
    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,59}$", description="name of the sweep and of its runs")
    base: str = Field(description="preset or YAML file that every trial starts from")
    overrides: dict[str, Any] = Field({}, description="dotted keys set in every trial")
    space: dict[str, Dimension] = Field({}, description="dotted key to its values")
    variants: dict[str, dict[str, Any]] = Field({}, description="name to dotted keys set together; one more grid")
    constraints: list[str] = Field([], description="expressions over dotted keys that every trial must satisfy")
    replicates: int = Field(1, ge=1, le=10**4, description="training seeds of each point")
    metric: str | None = Field(
        None, description="what is compared: of eval.metrics, or val_loss; null: the first metric"
    )
    search: Search = Search()
    scheduler: Scheduler = Scheduler()
    budget: Budgets = Budgets()
    max_concurrent: int = Field(2, ge=1, le=10**4, description="trials at a time")

    @field_validator("space", mode="before")
    @classmethod
    def _lists(cls, space: Any) -> Any:
        if not isinstance(space, dict):
            return space
        return {key: {"grid": value} if isinstance(value, list) else value for key, value in space.items()}

    def run_name(self, point: dict[str, Any]) -> str:
        """Return the name of the runs of a point."""
        return self.name

    @model_validator(mode="after")
    def _something(self) -> Sweep:
        if not self.space and not self.variants:
            raise ValueError("a sweep needs a space or variants")
        if self.search.name == "tpe" and self.scheduler.name == "halving":
            raise ValueError("search.name=tpe suggests trials one by one; use it with scheduler.name none or asha")
        if self.search.name == "grid" and any(d.grid is None for d in self.space.values()):
            raise ValueError("search.name=grid draws nothing: use random or tpe, or give grids alone")
        return self
