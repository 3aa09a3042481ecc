"""A suite of the benchmark: a sweep with further seeds, other projects' recipes, and evaluations at the runs' ends."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, ValidationError

from benchmarks.suites import cifar10
from diffscale.config.experiment import Experiment
from diffscale.config.load import explain, load_tree, merge
from diffscale.core import storage
from diffscale.core.errors import UserError
from diffscale.core.text import nearest
from diffscale.sweep.ledger import Ledger
from diffscale.sweep.run import trials_of
from diffscale.sweep.settings import Part, Sweep
from diffscale.sweep.space import Point, nest

SUITES = Path(__file__).parent
RESULTS = Path(__file__).parents[1] / "results"


class Repeat(Part):
    """Further training seeds of some runs, so that intervals hold the variance between seeds."""

    seeds: list[int] = Field(min_length=1)
    runs: list[str] = Field([], description="names of runs; none: every run")
    overrides: dict[str, Any] = Field({}, description="dotted keys over those of the runs")


class SuitePeer(Part):
    """Another project's network and training recipe, at the training FLOPs of the suite's first run."""

    name: Literal["diffusers", "denoising-diffusion-pytorch", "torchcfm"]
    widths: list[int] = Field(min_length=1, description="the best of these stands for the peer")
    flags: dict[str, int | float] = Field({}, description="flags of the peer's own script, other than its defaults")


class OnGpu(Part):
    """The suite at its GPU size."""

    flops: float = Field(50, gt=0, description="factor of the training FLOPs of every run")
    overrides: dict[str, Any] = Field({}, description="dotted keys over those of every run")
    peers: list[SuitePeer] | None = Field(None, description="none: those of the suite")
    ends: dict[str, Any] | None = Field(None, description="none: those of the suite")


class Suite(Sweep):
    """A sweep whose runs are benchmarked: one after the other on this machine, next to peers at equal training FLOPs.

    A suite's file may name a ready sweep (`sweep: unet-ablations`), whose keys it then adds to or replaces.
    """

    about: str = Field(description="the question that the suite answers")
    data: Literal["emoji", "cifar10"] = "emoji"
    repeats: list[Repeat] = Field([], description="further seeds, run after all others")
    peers: list[SuitePeer] = Field([], description="other projects' recipes at equal training FLOPs")
    ends: dict[str, Any] = Field({}, description="`eval` settings of one more evaluation at each run's end")
    gpu: OnGpu = OnGpu()

    def run_name(self, point: Point) -> str:
        """Return SUITE-VARIANT-VALUE..., as records name the run."""
        return "-".join([self.name, *(str(value) for key, value in point.items())])

    def on_gpu(self) -> Suite:
        """Return the suite with the peers and ends of its GPU size."""
        own = {"peers": self.gpu.peers, "ends": self.gpu.ends}
        return self.model_copy(update={name: value for name, value in own.items() if value is not None})

    def ledger(self, gpu: bool = False, extra: dict[str, Any] | None = None) -> Ledger:
        """Return the plan of the suite as a sweep. extra: nested settings over all others."""
        over = merge(nest(self.gpu.overrides) if gpu else {}, extra or {})
        if self.data == "cifar10":
            place = over.get("storage", load_tree(self.base).get("storage", storage.default_storage()))
            over = merge(over, {"data": {"path": storage.join(place, "datasets", "cifar10")}})
        return Ledger(self, over)

    def experiments(self, gpu: bool = False, extra: dict[str, Any] | None = None) -> list[Experiment]:
        """Return every run: those of the sweep, then the repeats. extra: nested settings over all others."""
        suite = self._grown() if gpu else self
        ledger = suite.ledger(gpu, extra)
        trials = trials_of(ledger)
        found = [experiment for trial in trials for experiment in trial.experiments]
        for repeat in suite.repeats:
            for trial in trials:
                if not repeat.runs or ledger.sweep.run_name(trial.point).removeprefix(f"{self.name}-") in repeat.runs:
                    found += [ledger.experiment(trial.point, seed, repeat.overrides) for seed in repeat.seeds]
        return found

    def _grown(self) -> Suite:
        """Return the suite with the training FLOPs of its GPU size."""
        budget = self.budget.trial.model_copy(update={"flops": (self.budget.trial.flops or 0) * self.gpu.flops})
        repeats = []
        for repeat in self.repeats:
            flops = repeat.overrides.get("train.flops")
            larger = {} if flops is None else {"train.flops": flops * self.gpu.flops}
            repeats.append(repeat.model_copy(update={"overrides": repeat.overrides | larger}))
        budgets = self.budget.model_copy(update={"trial": budget})
        return self.model_copy(update={"budget": budgets, "repeats": repeats})

    def make_data(self, experiment: Experiment) -> None:
        """Build the suite's dataset unless it exists."""
        if self.data == "cifar10":
            cifar10.build(experiment.data.path)


def suite_names() -> list[str]:
    """Return the names of the suites."""
    return sorted(f.stem for f in SUITES.glob("*.yaml"))


def load_suite(name: str) -> Suite:
    """Return a suite. Raise UserError with the nearest name, or with the mistake in the file."""
    if name not in suite_names():
        raise UserError(setting="SUITE", value=name, expected=nearest(name, suite_names()))
    tree: dict[str, Any] = yaml.safe_load((SUITES / f"{name}.yaml").read_text())
    if "sweep" in tree:
        sweep = load_tree(tree.pop("sweep"), kind="sweeps")
        overrides = sweep.get("overrides", {}) | tree.get("overrides", {})
        tree = sweep | tree | {"overrides": overrides}
    try:
        return Suite.model_validate(tree)
    except ValidationError as error:
        raise explain(error, Suite, tree) from None
