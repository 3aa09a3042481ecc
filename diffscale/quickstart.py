"""`make quickstart`: every part of diffscale on this machine, from the images in the package to the report.

Three backbones are trained, four settings are swept, every run is evaluated at several points of its training, and
the report tabulates distance against compute. Run it again to continue an interrupted run.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.console import Console

from diffscale.config.load import load_experiment
from diffscale.core.app import command_app, run_app
from diffscale.core.places import require_writable
from diffscale.records.schema import rank

if TYPE_CHECKING:
    from diffscale.config.experiment import Experiment
    from diffscale.data import Dataset
    from diffscale.records.schema import Record

app = command_app()

BACKBONES = ("unet", "uvit", "rin")
WORKERS = 2
SMALLEST = ["eval.n_generated=64", "train.flops=1.08e11"]
BUDGETS = [3.6e12 / 2 ** (step / 2) for step in range(11)]  # FLOPs of each backbone, from the presets' own down
TRIAL_SHARE, TRIALS = 0.5, 4  # of a backbone's FLOPs, in the sweep
# Measured here at three budgets: starts, evaluations and the report take 19 times the imports of a worker, and two
# workers train the three backbones and the trials at 0.55 of what two cores reach with the first one alone.
STARTS, TOGETHER = 19, 0.55
NEXT = (
    "your images: diffscale data build PHOTOS DATASET --resolution 32; "
    "the network for your compute: diffscale recommend DATASET --flops 1e16"
)


@app.command()
def main(
    storage: Annotated[Path, typer.Option(help="where the runs go")] = Path("quickstart"),
    out: Annotated[Path, typer.Option(help="where the report goes")] = Path("report"),
    minutes: Annotated[float, typer.Option(min=3, help="how long it may take: a faster machine trains longer")] = 6.0,
    size: Annotated[Literal["smallest", "default"], typer.Option(help="smallest is for CI")] = "default",
) -> None:
    """Images -> trained backbones -> sweep -> report/index.html, in a few minutes on two cores."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

    from diffscale.config.factory import open_training_data  # import cost
    from diffscale.distributed.connect import connect  # import cost
    from diffscale.records.store import read_records  # import cost
    from diffscale.report.write import copy_pictures, write_report  # import cost
    from diffscale.sweep.ledger import Ledger  # import cost
    from diffscale.sweep.run import load_sweep  # import cost
    from diffscale.sweep.run import run as run_sweep  # import cost
    from diffscale.training.run import train  # import cost

    for option, folder in (("--storage", storage), ("--out", out)):
        require_writable(str(folder.resolve()), option)
    console, started = Console(), time.monotonic()
    report = out.resolve()

    def step(number: int, title: str) -> None:
        console.rule(f"[bold]{number}/4[/] {title}   [dim]{time.monotonic() - started:.0f} s", align="left")

    earlier = _evaluations(storage)
    step(1, "Arrow shards from the images in the package")
    given = [f"storage={storage.resolve()}", f"train.workers={WORKERS}", *(SMALLEST if size == "smallest" else ())]
    first = load_experiment(f"few-emoji-{BACKBONES[0]}", given)
    data = open_training_data(first)
    console.print(f"{data.n:,} images, {data.num_classes} classes, {data.resolution} pixels")
    if size == "default":
        flops = budget_for(storage / "budget.json", minutes, first, data)
        given.append(f"train.flops={flops}")
        console.print(f"{flops:.2g} training FLOPs for each backbone, for about {minutes:g} minutes on this machine")
    experiments = [load_experiment(f"few-emoji-{backbone}", given) for backbone in BACKBONES]
    samples = f"eval.n_generated={first.eval.n_generated}"
    trial = f"budget.trial.flops={(experiments[0].train.flops or 0.0) * TRIAL_SHARE}"
    sweep = load_sweep("quickstart", [f"storage={storage.resolve()}", samples, trial])

    step(2, f"training {', '.join(BACKBONES)} through Ray Train on {WORKERS} workers")
    connect(num_cpus=WORKERS)
    backbones = [train(experiment).run_folder for experiment in experiments]

    step(3, "sweeping noise schedule x resolution through Ray Tune")
    ledger = Ledger(sweep)
    result = run_sweep(ledger)
    folders = [*backbones, *(folder for trial in result.trials for folder in trial.folders)]

    step(4, "the report")
    write_report(folders, report)
    pictures = copy_pictures(folders, report)
    console.print(f"finished in {time.monotonic() - started:.0f} s; look at:")
    for path in [report / "index.html", report / "fid_vs_compute.csv", *pictures]:
        console.print(f"  {path}", soft_wrap=True, highlight=False)
    if earlier:
        console.print(_reused(earlier, _evaluations(storage), storage), soft_wrap=True, highlight=False)
    trials = [rows for trial in result.trials if (rows := ledger.records(trial))]
    learnt = lessons([read_records([folder]) for folder in backbones], trials)
    for title, line in zip(("backbones", "sweep", "next"), (*learnt, NEXT), strict=True):
        console.print(f"[bold]{title}[/]: {line}", soft_wrap=True, highlight=False)
    raise typer.Exit(int(bool(result.failed)))


def budget_for(file: Path, minutes: float, experiment: Experiment, data: Dataset) -> float:
    """Return the FLOPs of each backbone with which everything takes about `minutes` on this machine.

    file: keeps the answer, so that the command, given again, continues with the same runs
    """
    from diffscale.training.speed import core_flops_per_second  # import cost

    if file.exists() and (stored := json.loads(file.read_text()))["minutes"] == minutes:
        return float(stored["flops"])
    of_a_worker = {"global_batch": experiment.train.global_batch // WORKERS}
    share = experiment.model_copy(update={"train": experiment.train.model_copy(update=of_a_worker)})
    training_seconds = max(60 * minutes - STARTS * _seconds_of_imports(), 60.0)
    affordable = TOGETHER * WORKERS * core_flops_per_second(share, data) * training_seconds
    each = affordable / (len(BACKBONES) + TRIALS * TRIAL_SHARE)
    flops = next((budget for budget in BUDGETS if budget <= each), BUDGETS[-1])
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({"minutes": minutes, "flops": flops}))
    return flops


def _seconds_of_imports() -> float:
    """Return the CPU seconds of a worker's imports, the second time: the first time Python may have to compile them."""
    for _ in range(2):
        before = os.times()
        subprocess.run([sys.executable, "-c", "import ray.train, timm, diffscale.training.worker"], check=True)
        after = os.times()
    return after.children_user - before.children_user + after.children_system - before.children_system


def _evaluations(storage: Path) -> int:
    """Return how many evaluations of runs the storage holds."""
    return len(list(storage.glob("runs/*/records/*.json")))


def _reused(earlier: int, now: int, storage: Path) -> str:
    """Return what was taken over from an earlier quickstart. earlier, now: evaluations before and after this one."""
    what = "every run" if now == earlier else f"what was there: {earlier} of {now} evaluations, and their checkpoints"
    return f"reused {what}, from {storage}/; delete that folder to train again"


def lessons(backbones: list[list[Record]], trials: list[list[Record]]) -> tuple[str, str]:
    """Return a line about the backbones and one about the sweep; of each run and trial the evaluations in order."""
    ends = sorted((run[-1] for run in backbones), key=_rank)
    best, values = ends[0], ", ".join(f"{end.model} {end.value:.0f}" for end in ends)
    about_backbones = (
        f"after {best.train_flops:.1e} FLOPs {values} ({best.metric}, lower is better; one seed each, so no ranking); "
        f"{best.memorisation:.0%} of {best.model}'s samples are nearer to a training image than unseen emoji are"
    )
    last = sorted((trial[-1] for trial in trials), key=_rank)
    early, late = min((trial[0] for trial in trials), key=_rank), last[0]
    lead = f"{early.train_resolution} pixels lead after {early.train_flops:.1e} FLOPs ({early.value:.0f})"
    lead += " and" if early.train_resolution == late.train_resolution else f", {late.train_resolution} pixels"
    at_best = [end for end in last if end.train_resolution == late.train_resolution]
    schedules = ", ".join(f"{end.schedule} {end.value:.0f}" for end in at_best)
    return about_backbones, f"{lead} after {late.train_flops:.1e} ({late.value:.0f}); schedules there: {schedules}"


def _rank(record: Record) -> float:
    return rank(record.metric, record.value)


if __name__ == "__main__":
    run_app(app)
