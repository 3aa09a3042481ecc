"""`python -m benchmarks.suites.budget` writes suites/budget.csv: size and expected cost of every run."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import pandas as pd

from benchmarks.suites.peers import COSTS, require
from benchmarks.suites.suite import SUITES, Suite, load_suite, suite_names
from diffscale.config.experiment import Experiment
from diffscale.config.factory import build_model, build_solver
from diffscale.core.app import command_app, run_app
from diffscale.core.hashing import identify
from diffscale.models.cost import Cost, count_cost

app = command_app()
FILE = SUITES / "budget.csv"
CLASSES = {"emoji": 9, "cifar10": 10}
TRAINING_RATE, SAMPLING_RATE, FEATURE_RATE = 70e9, 90e9, 100e9
"""FLOP/s of two cores of an AMD EPYC without bf16, 2026-11-24: the basis of the expected seconds."""
FEATURE_FLOPS = {"fid": 11.4e9, "fd_efficientnet_lite0": 0.26e9}  # of one image, at the network's own input size


class Images(NamedTuple):
    """Facts about the data that a backbone needs."""

    resolution: int
    channels: int
    num_classes: int


def cost_of(suite: Suite, experiment: Experiment, known: dict[str, Cost]) -> Cost:
    """known: what was counted before, by model and images, for the runs that share them."""
    images = Images(experiment.data.resolution, 3, CLASSES[suite.data])
    classes = experiment.num_classes(images)
    key = identify(model=experiment.model.model_dump(mode="json"), resolution=images.resolution, classes=classes)
    if key not in known:
        known[key] = count_cost(lambda: build_model(experiment, images), images.resolution, 3, classes)  # type: ignore[arg-type]
    return known[key]


def budget(suite: Suite, experiments: list[Experiment]) -> pd.DataFrame:
    """A row for each run, then for each peer: size, compute, evaluations, and the seconds expected on two cores.

    Raises UserError if the package of a peer is not installed.
    """
    for peer in suite.peers:
        require(peer.name)
    rows: list[dict[str, object]] = []
    known: dict[str, Cost] = {}
    for experiment in experiments:
        name = experiment.name.removeprefix(f"{suite.name}-")
        points = len(set(experiment.eval.points)) + len(experiment.eval.points_flops)
        cost = cost_of(suite, experiment, known)
        rows.append(_row(suite, experiment, name, experiment.train.seed, cost, points, suite.ends))
    like = experiments[0]
    for peer in suite.peers:
        for width in peer.widths:
            cost = COSTS[peer.name](width, like.data.resolution)
            rows.append(_row(suite, like, f"{peer.name}-{width}", 0, cost, 1, {}))
    return pd.DataFrame(rows)


def _row(
    suite: Suite, experiment: Experiment, name: str, seed: int, cost: Cost, points: int, ends: dict[str, Any]
) -> dict[str, object]:
    e, flops = experiment.eval, experiment.train.flops
    assert flops is not None, "train.flops bounds every run of a suite: it is the compute axis"
    nfe = int(build_solver(experiment).nfe)
    sampled = 2 * cost.forward_macs * nfe / SAMPLING_RATE
    seconds = points * e.n_generated * (sampled + _feature_seconds(e.metrics))
    if ends:
        seconds += ends["n_generated"] * (sampled + _feature_seconds(ends.get("metrics", e.metrics)))
    return {
        "suite": suite.name,
        "run": name,
        "seed": seed,
        "parameters": cost.parameters,
        "forward_gflop": round(2 * cost.forward_macs / 1e9, 4),
        "training_gflop_per_image": round(cost.flops_per_image / 1e9, 4),
        "train_flops": flops,
        "images": round(flops / cost.flops_per_image),
        "points": points,
        "n": e.n_generated,
        "n_at_end": ends.get("n_generated", e.n_generated),
        "nfe": nfe,
        "training_seconds": round(flops / TRAINING_RATE),
        "evaluation_seconds": round(seconds),
    }


def _feature_seconds(metrics: Iterable[str]) -> float:
    """Return the seconds that the features of one image take."""
    return sum(FEATURE_FLOPS[metric] for metric in metrics if metric in FEATURE_FLOPS) / FEATURE_RATE


def everything() -> pd.DataFrame:
    suites = map(load_suite, suite_names())
    return pd.concat([budget(suite, suite.experiments()) for suite in suites], ignore_index=True)


@app.command()
def main() -> None:
    """Write size and expected cost of every run of every suite to benchmarks/suites/budget.csv."""
    everything().to_csv(FILE, index=False, lineterminator="\n")
    print(f"wrote {FILE}")


if __name__ == "__main__":
    run_app(app)
