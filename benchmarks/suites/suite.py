"""A suite: the runs that a benchmark is made of (benchmarks/suites/*.yaml)."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from benchmarks.suites import cifar10
from diffscale.config.experiment import Experiment
from diffscale.config.load import explain, load_tree, merge, validate
from diffscale.core import storage
from diffscale.core.errors import UserError
from diffscale.core.text import nearest

SUITES = Path(__file__).parent
RESULTS = Path(__file__).parents[1] / "results"


class Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class SuiteRun(Part):
    name: str = Field(description="the run's name: what differs from the suite's other runs")
    settings: dict[str, Any] = Field({}, description="settings of this run, nested, over those of the suite")
    seeds: list[int] = Field([0], min_length=1)


class SuitePeer(Part):
    """Another project's network and training recipe, at the training FLOPs of the suite's first run."""

    name: Literal["diffusers", "denoising-diffusion-pytorch"]
    widths: list[int] = Field(min_length=1, description="the best of these stands for the peer")


class OnGpu(Part):
    """How the suite grows on a GPU: `flops` times the compute, settings over those of every run, other peers, ends."""

    flops: float = Field(50, gt=0)
    settings: dict[str, Any] = {}
    peers: list[SuitePeer] | None = Field(None, description="none: those of the suite")
    ends: dict[str, Any] | None = Field(None, description="none: those of the suite")


class Suite(Part):
    name: str
    about: str = Field(description="what the suite is to show")
    base: str = Field("emoji-base", description="preset that every run starts from")
    data: Literal["emoji", "cifar10"] = "emoji"
    settings: dict[str, Any] = Field({}, description="settings of every run, nested")
    runs: list[SuiteRun] = Field(min_length=1)
    peers: list[SuitePeer] = []
    ends: dict[str, Any] = Field({}, description="`eval` settings of one more evaluation at each run's end")
    gpu: OnGpu = OnGpu()

    def on_gpu(self) -> Suite:
        """With the peers and ends that it has there."""
        own = {"peers": self.gpu.peers, "ends": self.gpu.ends}
        return self.model_copy(update={name: value for name, value in own.items() if value is not None})

    def experiments(self, gpu: bool = False, extra: dict[str, Any] | None = None) -> list[Experiment]:
        """Every run, in the suite's order. extra: nested settings over all others."""
        return [self._experiment(run, seed, gpu, extra or {}) for run in self.runs for seed in run.seeds]

    def _experiment(self, run: SuiteRun, seed: int, gpu: bool, extra: dict[str, Any]) -> Experiment:
        own = {"name": f"{self.name}-{run.name}", "train": {"seed": seed}}
        tree = merge(merge(merge(load_tree(self.base), self.settings), run.settings), own)
        if gpu:
            tree = merge(tree, self.gpu.settings)
            tree["train"]["flops"] *= self.gpu.flops
        tree = merge(tree, extra)
        if self.data == "cifar10":
            place = tree.get("storage", storage.default_storage())
            tree = merge(tree, {"data": {"path": storage.join(place, "datasets", "cifar10")}})
        return validate(tree)

    def make_data(self, experiment: Experiment) -> None:
        if self.data == "cifar10":
            cifar10.build(experiment.data.path)


def suite_names() -> list[str]:
    return sorted(f.stem for f in SUITES.glob("*.yaml"))


def load_suite(name: str) -> Suite:
    """Raises UserError with the nearest name, or for what is wrong in the file."""
    if name not in suite_names():
        raise UserError(setting="SUITE", value=name, expected=nearest(name, suite_names()))
    tree: dict[str, Any] = yaml.safe_load((SUITES / f"{name}.yaml").read_text())
    try:
        return Suite.model_validate(tree)
    except ValidationError as error:
        raise explain(error, Suite, tree) from None
