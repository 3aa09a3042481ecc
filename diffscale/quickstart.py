"""`make quickstart`: the whole product on this machine, from the images in the package to the report.

Three backbones are trained, four settings are swept, every run is evaluated at several points of its training, and
the report tabulates distance against compute. Called again, it takes up where it was cut off.
"""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console

from diffscale.config.load import load_experiment
from diffscale.core.app import command_app, run_app

app = command_app()

BACKBONES = ("unet", "uvit", "rin")
WORKERS = 2
SCALE = {"smallest": 0.1, "default": 1.0}
SAMPLES = {"smallest": 64, "default": 256}


@app.command()
def main(
    storage: Annotated[Path, typer.Option(help="where the runs go")] = Path("quickstart"),
    out: Annotated[Path, typer.Option(help="where the report goes")] = Path("report"),
    size: Annotated[Literal["smallest", "default"], typer.Option(help="smallest is for CI")] = "default",
) -> None:
    """Images -> trained backbones -> sweep -> report/index.html, in a few minutes on two cores."""
    console, started = Console(), time.monotonic()
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    place = storage.resolve()
    shared = [f"storage={place}", f"eval.n_generated={SAMPLES[size]}"]

    from diffscale.training.run import train  # import cost
    from diffscale.config.factory import open_training_data
    from diffscale.distributed.connect import connect
    from diffscale.report import write_report
    from diffscale.sweep.ledger import Ledger
    from diffscale.sweep.run import load_sweep
    from diffscale.sweep.run import run as run_sweep

    def step(number: int, what: str) -> None:
        console.rule(f"[bold]{number}/4[/] {what}   [dim]{time.monotonic() - started:.0f} s", align="left")

    step(1, "Arrow shards from the images in the package")
    experiments = []
    for backbone in BACKBONES:
        preset = f"quickstart-{backbone}"
        flops = load_experiment(preset).train.flops or 0.0
        settings = [*shared, f"train.flops={flops * SCALE[size]}", f"train.workers={WORKERS}"]
        experiments.append(load_experiment(preset, settings))
    sweep = load_sweep("quickstart", shared)
    sweep_flops = (sweep.budget.trial.flops or 0.0) * SCALE[size]
    sweep = load_sweep("quickstart", [*shared, f"budget.trial.flops={sweep_flops}"])
    data = open_training_data(experiments[0])
    console.print(f"{data.n:,} images, {data.num_classes} classes, {data.resolution} pixels")

    step(2, f"training {', '.join(BACKBONES)} through Ray Train on {WORKERS} workers")
    connect(num_cpus=WORKERS)
    folders = [train(experiment).run_folder for experiment in experiments]

    step(3, "sweeping noise schedule x resolution through Ray Tune")
    result = run_sweep(Ledger(sweep))
    folders += [folder for trial in result.trials for folder in trial.folders]

    step(4, "the report")
    write_report(folders, out.resolve())
    pictures = put_pictures_on_top(folders, out.resolve())
    console.print(f"finished in {time.monotonic() - started:.0f} s; look at:")
    for path in [out.resolve() / "index.html", out.resolve() / "fid_vs_compute.csv", *pictures]:
        console.print(f"  {path}", soft_wrap=True, highlight=False)
    if result.failed:
        raise typer.Exit(1)


def put_pictures_on_top(folders: list[str], out: Path) -> list[Path]:
    """The main plot and the newest sample grid of each run, where a first look finds them."""
    plot = out / "fid_vs_compute.png"
    shutil.copyfile(out / "plots" / plot.name, plot)
    pictures = [plot]
    for folder in map(Path, folders):
        grids = sorted((folder / "samples").glob("*.png"))
        if grids:
            pictures.append(out / f"samples-{folder.name}.png")
            shutil.copyfile(grids[-1], pictures[-1])
    return pictures


if __name__ == "__main__":
    run_app(app)
