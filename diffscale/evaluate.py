"""`python -m diffscale.evaluate RUN | CHECKPOINT | FOLDER [eval.key=value ...]`: metrics, over Ray.

A run or a checkpoint gets new records next to those of its training; repeating the command skips finished work and
resumes an interrupted evaluation. A folder of images, an .npz of samples or an Arrow dataset is compared with
`--reference`.
"""

from __future__ import annotations

import json
import os
from functools import partial
from typing import Annotated

import typer

from diffscale.core import storage
from diffscale.core.app import command_app, run_app
from diffscale.core.console import make_console
from diffscale.core.places import require_writable
from diffscale.records.guidance import choice_text, choices

app = command_app()


@app.command()
def main(
    target: Annotated[str, typer.Argument(metavar="RUN|CHECKPOINT|FOLDER", help="what to evaluate")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[EVAL.KEY=VALUE]...", help="eval settings")] = None,
    metrics: Annotated[str, typer.Option(help="comma-separated; short for eval.metrics")] = "",
    n: Annotated[int, typer.Option(help="samples; short for eval.n_generated")] = 0,
    checkpoint: Annotated[str, typer.Option(help="last, all, or images seen")] = "last",
    ema: Annotated[list[str] | None, typer.Option(help="weights; may be given several times")] = None,
    solver: Annotated[list[str] | None, typer.Option(help="heun,steps=18; may be given several times")] = None,
    guidance: Annotated[
        list[str] | None, typer.Option(help="1.5 or 1.5,interval=-3:5; several: the best on held-out images is named")
    ] = None,
    labels: Annotated[str, typer.Option(help="train, uniform, balanced, none, or a class")] = "train",
    precision: Annotated[str, typer.Option(help="fp32 or bf16 for sampling; default: as the run computes")] = "",
    reference: Annotated[str, typer.Option(help="dataset, folder, .npz or cifar10, ...; a run has its images")] = "",
    resize: Annotated[str, typer.Option(help="default, tf1, clean, antialiased; named in the metric")] = "default",
    per_class: Annotated[bool, typer.Option("--per-class", help="each metric for each class too")] = False,
    memorised: Annotated[int, typer.Option(help="samples in a picture of those nearest to training images")] = 0,
    resolution: Annotated[
        int, typer.Option(help="side in pixels to which images of a folder are cropped and resized")
    ] = 0,
    keep: Annotated[str, typer.Option(help="folder in which to keep the images")] = "",
    keep_format: Annotated[str, typer.Option(help="png, arrow or npz")] = "png",
    weights: Annotated[str, typer.Option(help="file or folder with weights of feature networks")] = "",
    workers: Annotated[int, typer.Option(help="Ray actors; 0: one for each GPU, or else CPU, of the cluster")] = 0,
    out: Annotated[str, typer.Option(help="also write the rows to this JSON file")] = "",
) -> None:
    """Evaluate a run, a checkpoint or a folder of images."""
    from diffscale.evaluation.networks.weights import weights_from  # import cost
    from diffscale.evaluation.table import rows_table, warnings_of  # import cost
    from diffscale.training.evaluate_runs import EvaluateOptions, evaluate_target  # import cost

    for option, folder in (("--keep", keep), ("--out", out and os.path.dirname(storage.resolve(out, "--out")))):
        if folder:
            require_writable(storage.resolve(folder, option), option)
    console = make_console()
    print_picture = partial(console.print, "picture:", soft_wrap=True)
    target = storage.resolve(target, "TARGET", written=False)
    options = EvaluateOptions(
        checkpoint=checkpoint,
        averages=tuple(ema or ()),
        solvers=tuple(solver or ()),
        guidances=tuple(guidance or ()),
        labels=labels,
        precision=precision,
        reference=reference,
        per_class=per_class,
        memorised=memorised,
        resolution=resolution,
        keep=keep,
        keep_format=keep_format,
        workers=workers,
    )
    with weights_from(weights):
        rows = evaluate_target(target, overrides or [], metrics, n, resize, options, print_picture)
    console.print(rows_table(rows))
    for group, best in choices(rows) if guidance else []:
        console.print(choice_text(group, best), soft_wrap=True, highlight=False)
    for warning in warnings_of(rows):
        console.print(f"[yellow]note:[/] {warning}", soft_wrap=True)
    if out:
        storage.write_bytes(storage.resolve(out, "--out"), json.dumps(rows, indent=1).encode())


if __name__ == "__main__":
    run_app(app)
