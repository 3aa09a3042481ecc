"""`make quickstart`: every part of diffscale on this machine, from the images in the package to the report.

Three backbones are trained, four settings are swept, every run is evaluated at several points of its training, and
the report tabulates distance against compute. Run it again to continue an interrupted run.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.console import Console

from diffscale.config.load import load_experiment
from diffscale.core.app import command_app, run_app
from diffscale.core.places import require_writable

if TYPE_CHECKING:
    import pandas as pd

app = command_app()

BACKBONES = ("unet", "uvit", "rin")
WORKERS = 2
SCALE = {"smallest": 0.03, "default": 1.0}
SAMPLES = {"smallest": 64, "default": 128}
NEXT = (
    "your images: diffscale data build PHOTOS DATASET --resolution 32; "
    "the network for your compute: diffscale recommend DATASET --flops 1e15"
)


@app.command()
def main(
    storage: Annotated[Path, typer.Option(help="where the runs go")] = Path("quickstart"),
    out: Annotated[Path, typer.Option(help="where the report goes")] = Path("report"),
    size: Annotated[Literal["smallest", "default"], typer.Option(help="smallest is for CI")] = "default",
) -> None:
    """Images -> trained backbones -> sweep -> report/index.html, in a few minutes on two cores."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

    from diffscale.config.factory import open_training_data  # import cost
    from diffscale.distributed.connect import connect  # import cost
    from diffscale.report.write import copy_pictures, write_report  # import cost
    from diffscale.sweep.ledger import Ledger  # import cost
    from diffscale.sweep.run import load_sweep  # import cost
    from diffscale.sweep.run import run as run_sweep  # import cost
    from diffscale.training.run import train  # import cost

    for option, folder in (("--storage", storage), ("--out", out)):
        require_writable(str(folder.resolve()), option)
    console, started = Console(), time.monotonic()
    shared = [f"storage={storage.resolve()}", f"eval.n_generated={SAMPLES[size]}"]
    report = out.resolve()

    def step(number: int, title: str) -> None:
        console.rule(f"[bold]{number}/4[/] {title}   [dim]{time.monotonic() - started:.0f} s", align="left")

    earlier = _evaluations(storage)
    step(1, "Arrow shards from the images in the package")
    experiments = []
    for preset in (f"few-emoji-{backbone}" for backbone in BACKBONES):
        flops = (load_experiment(preset).train.flops or 0.0) * SCALE[size]
        settings = [*shared, f"train.flops={flops}", f"train.workers={WORKERS}"]
        experiments.append(load_experiment(preset, settings))
    trial_flops = (load_sweep("quickstart", shared).budget.trial.flops or 0.0) * SCALE[size]
    sweep = load_sweep("quickstart", [*shared, f"budget.trial.flops={trial_flops}"])
    data = open_training_data(experiments[0])
    console.print(f"{data.n:,} images, {data.num_classes} classes, {data.resolution} pixels")

    step(2, f"training {', '.join(BACKBONES)} through Ray Train on {WORKERS} workers")
    connect(num_cpus=WORKERS)
    folders = [train(experiment).run_folder for experiment in experiments]

    step(3, "sweeping noise schedule x resolution through Ray Tune")
    result = run_sweep(Ledger(sweep))
    folders += [folder for trial in result.trials for folder in trial.folders]

    step(4, "the report")
    rows = write_report(folders, report).rows
    pictures = copy_pictures(folders, report)
    console.print(f"finished in {time.monotonic() - started:.0f} s; look at:")
    for path in [report / "index.html", report / "fid_vs_compute.csv", *pictures]:
        console.print(f"  {path}", soft_wrap=True, highlight=False)
    if earlier:
        console.print(_reused(earlier, _evaluations(storage), storage), soft_wrap=True, highlight=False)
    for title, line in zip(("backbones", "sweep", "next"), (*lessons(rows), NEXT), strict=True):
        console.print(f"[bold]{title}[/]: {line}", soft_wrap=True, highlight=False)
    raise typer.Exit(int(bool(result.failed)))


def _evaluations(storage: Path) -> int:
    """Return how many evaluations of runs the storage holds."""
    return len(list(storage.glob("runs/*/records/*.json")))


def _reused(earlier: int, now: int, storage: Path) -> str:
    """Return what was taken over from an earlier quickstart. earlier, now: evaluations before and after this one."""
    what = "every run" if now == earlier else f"what was there: {earlier} of {now} evaluations, and their checkpoints"
    return f"reused {what}, from {storage}/; delete that folder to train again"


def lessons(rows: pd.DataFrame) -> tuple[str, str]:
    """Return a line about the backbones and one about the sweep. rows: every evaluation, `Analysis.rows`."""
    rows = rows.sort_values("images_seen")
    swept = rows["run_name"].str.contains("sweep")
    ends = rows[~swept].groupby("run_id").tail(1).sort_values("value")
    best, values = ends.iloc[0], ", ".join(f"{end.model} {end.value:.0f}" for end in ends.itertuples())
    backbones = (
        f"after {best.train_flops:.1e} FLOPs {values} ({best.metric}, lower is better; one seed each, so no ranking); "
        f"{best.memorisation:.0%} of {best.model}'s samples are nearer to a training image than unseen emoji are"
    )
    trials = rows[swept].groupby("run_id")
    first, last = (evaluations.sort_values("value") for evaluations in (trials.head(1), trials.tail(1)))
    early, late = first.iloc[0], last.iloc[0]
    lead = f"{early.train_resolution} pixels lead after {early.train_flops:.1e} FLOPs ({early.value:.0f})"
    lead += " and" if early.train_resolution == late.train_resolution else f", {late.train_resolution} pixels"
    at_best = last[last["train_resolution"] == late.train_resolution]
    schedules = ", ".join(f"{trial.schedule} {trial.value:.0f}" for trial in at_best.itertuples())
    return backbones, f"{lead} after {late.train_flops:.1e} ({late.value:.0f}); schedules there: {schedules}"


if __name__ == "__main__":
    run_app(app)
