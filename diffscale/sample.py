"""`python -m diffscale.sample RUN | CHECKPOINT ... [eval.key=value ...]`: images from trained networks, over Ray.

Image i comes from seed i whatever the batch and the number of workers. Several runs are also compared on one sheet,
at the same seeds.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from diffscale.core import storage
from diffscale.core.app import command_app, run_app
from diffscale.core.errors import UserError
from diffscale.core.places import require_writable

app = command_app()


@app.command()
def main(
    targets: Annotated[list[str], typer.Argument(metavar="RUN|CHECKPOINT... [EVAL.KEY=VALUE]...")],
    n: Annotated[int, typer.Option(help="images of each")] = 64,
    out: Annotated[str, typer.Option(help="folder for images and pictures")] = "samples",
    keep_format: Annotated[str, typer.Option("--format", help="png, arrow, npz (ADM's), or grid")] = "png",
    checkpoint: Annotated[str, typer.Option(help="last, all, or images seen")] = "last",
    ema: Annotated[str, typer.Option(help="weights: none, halflife, a power width; default eval.ema")] = "",
    solver: Annotated[str, typer.Option(help="heun,steps=18; default eval.solver")] = "",
    labels: Annotated[str, typer.Option(help="train, uniform, balanced, none, or a class")] = "balanced",
    precision: Annotated[str, typer.Option(help="fp32 or bf16; default: as the run computes")] = "",
    guide: Annotated[str, typer.Option(help="run or checkpoint that guides; short for eval.guide")] = "",
    trajectory: Annotated[int, typer.Option(help="samples shown as strips from noise to image")] = 0,
    workers: Annotated[int, typer.Option(help="Ray actors; 0: one for each GPU, or else CPU, of the cluster")] = 0,
) -> None:
    """Draw images; with several runs, compare them at the same seeds."""
    from diffscale.training.draw_samples import DrawOptions, comparison, draw_samples  # import cost
    from diffscale.training.load import is_run, list_targets, load_trained, settings_of_run  # import cost

    overrides = [t for t in targets if re.match(r"^[A-Za-z_][\w.]*=", t)]
    runs = [storage.resolve(t, "TARGET", written=False) for t in targets if t not in overrides]
    for run in runs:
        if not is_run(run):
            raise UserError(setting="RUN", value=run, expected="a run's folder or a checkpoint of one")
    if n < 1 or not runs:
        raise UserError(setting="n", value=n, expected="at least 1, of at least one run")
    require_writable(storage.resolve(out, "--out"), "--out")
    if guide:
        overrides.append(f"eval.guide={storage.resolve(guide, '--guide', written=False)}")
    options = DrawOptions(n, keep_format, labels, precision, trajectory, workers)
    rows = []
    for uri in (uri for run in runs for uri in list_targets(run, checkpoint)):
        experiment = settings_of_run(uri, overrides, solver or None)
        trained = load_trained(uri, ema or experiment.eval.ema, experiment)
        folder = Path(out).resolve() / f"{experiment.name}-{trained.images_seen:09d}-{trained.ema}"
        rows.append((trained.label, draw_samples(trained, folder, options)))
        Console().print(f"{trained.label}: {n} images in {folder}", soft_wrap=True)
    if len(rows) > 1:
        storage.write_bytes(str(Path(out).resolve() / "comparison.png"), comparison(rows))


if __name__ == "__main__":
    run_app(app)
