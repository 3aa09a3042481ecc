"""`python -m diffscale.evaluate RUN | CHECKPOINT | FOLDER [eval.key=value ...]`: metrics, over Ray.

A run or a checkpoint gets new records beside those of its training; the same command again repeats nothing, and one
that was cut off goes on. A folder of images, an .npz of samples or an Arrow dataset is compared with `--reference`.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from diffscale.config.factory import build_solver
from diffscale.core import storage
from diffscale.core.app import run_app
from diffscale.core.errors import UserError
from diffscale.distributed.connect import connect
from diffscale.evaluation import Evaluator, Sampling
from diffscale.evaluation.distribute import devices
from diffscale.evaluation.folder import evaluate_folder
from diffscale.evaluation.networks.weights import cache_folder, weights_from
from diffscale.evaluation.sample_writer import Keeper
from diffscale.records.store import identify, write_record
from diffscale.training.checkpoint_evaluation import make_record
from diffscale.training.load import Trained, find_checkpoints, is_run, load_trained, settings_of_run

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
console = Console()
WHAT = ("images_seen", "ema", "solver", "nfe")


@app.command()
def main(
    target: Annotated[str, typer.Argument(metavar="RUN|CHECKPOINT|FOLDER", help="what to evaluate")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[EVAL.KEY=VALUE]...", help="eval settings")] = None,
    metrics: Annotated[str, typer.Option(help="comma-separated; short for eval.metrics")] = "",
    n: Annotated[int, typer.Option(help="samples; short for eval.n_generated")] = 0,
    checkpoint: Annotated[str, typer.Option(help="last, all, or images seen")] = "last",
    ema: Annotated[list[str] | None, typer.Option(help="weights; may be given several times")] = None,
    solver: Annotated[list[str] | None, typer.Option(help="heun,steps=18; may be given several times")] = None,
    labels: Annotated[str, typer.Option(help="train, uniform, balanced, none, or a class")] = "train",
    precision: Annotated[str, typer.Option(help="fp32 or bf16 for sampling")] = "fp32",
    reference: Annotated[str, typer.Option(help="dataset, folder or .npz; a run has its training set")] = "",
    resize: Annotated[str, typer.Option(help="default, tf1, clean, antialiased; named in the metric")] = "default",
    per_class: Annotated[bool, typer.Option("--per-class", help="each metric for each class too")] = False,
    memorised: Annotated[int, typer.Option(help="picture of so many samples nearest to training images")] = 0,
    keep: Annotated[str, typer.Option(help="folder in which to keep the images")] = "",
    keep_format: Annotated[str, typer.Option(help="png or arrow")] = "png",
    weights: Annotated[str, typer.Option(help="file or folder with weights of feature networks")] = "",
    workers: Annotated[int, typer.Option(help="Ray actors; 0: one for each GPU, or else CPU, of the cluster")] = 0,
    out: Annotated[str, typer.Option(help="also write the rows to this JSON file")] = "",
) -> None:
    """Evaluate a run, a checkpoint or a folder of images."""
    target = str(Path(target).resolve()) if not storage.is_remote(target) else target
    how = How(labels, precision, reference, per_class, memorised, keep, keep_format, workers)
    with weights_from(weights):
        if is_run(target):
            eval_settings = list(overrides or [])
            eval_settings += [f"eval.metrics=[{metrics}]"] if metrics else []
            eval_settings += [f"eval.n_generated={n}"] if n else []
            eval_settings += [f"eval.resize={resize}"] if resize != "default" else []
            rows = evaluate_run(target, eval_settings, how, checkpoint=checkpoint, averages=ema, solvers=solver)
        else:
            given = {"OVERRIDE": overrides, "n": n, "ema": ema, "solver": solver, "keep": keep}
            for setting, value in given.items():
                if value:
                    expected = "a run or a checkpoint of one: images that are there already are not sampled"
                    raise UserError(setting=setting, value=value, expected=expected)
            rows = _folder_rows(target, metrics or "fid", resize, how)
    _show(rows)
    if out:
        storage.write_bytes(str(Path(out).resolve()), json.dumps(rows, indent=1).encode())


@dataclass(frozen=True)
class How:
    """What the command's options say beyond the `eval` settings; see their help."""

    labels: str = "train"
    precision: str = "fp32"
    reference: str = ""
    per_class: bool = False
    memorised: int = 0
    keep: str = ""
    keep_format: str = "png"
    workers: int = 0


def evaluate_run(
    target: str,
    overrides: Iterable[str] = (),
    how: How = How(),
    *,
    checkpoint: str = "last",
    averages: Sequence[str] | None = None,
    solvers: Sequence[str] | None = None,
) -> list[dict[str, Any]]:
    """Evaluates every checkpoint × average × solver that is asked for and writes records into the run's folder.

    Returns the rows, as plain dicts of a record's columns. Weights of the feature networks are loaded before the
    first sample is drawn: UserError when there are none.
    """
    overrides = list(overrides)
    rows: list[dict[str, Any]] = []
    for uri in find_checkpoints(target, checkpoint):
        chosen: Sequence[str | None] = solvers or [None]
        for solver in chosen:
            experiment = settings_of_run(uri, overrides, solver)
            for average in averages or [experiment.eval.ema]:
                rows += _evaluate_one(load_trained(uri, average, experiment), how)
    return rows


def _evaluate_one(trained: Trained, how: How) -> list[dict[str, Any]]:
    experiment = trained.experiment
    connect()
    actors, device = devices(how.workers)
    larger = trained.at_eval_resolution()
    evaluator = Evaluator(
        experiment.eval,
        trained.dataset,
        experiment.storage,
        heldout=(larger or trained.dataset).heldout,
        at_eval_resolution=larger,
        device=device,
        actors=actors,
        per_class=how.per_class,
        reference_file=Path(how.reference).resolve() if how.reference else None,
    )
    sampling = evaluator.sampling(build_solver(experiment), precision=how.precision)
    sampling = replace(sampling, labels=how.labels)
    views = [str(v) for v in (*evaluator.views.values(), *evaluator.native.values())]
    identity = identify(
        run=trained.columns["run_id"],
        images=trained.images_seen,
        ema=trained.ema,
        sampler=sampling.canonical(),
        seed=sampling.seed,
        batch=sampling.batch,
        views=views,
        keep=how.keep,
    )
    work = cache_folder() / "evaluations" / identity
    keeper = _keeper(trained, sampling, how) if how.keep else None
    evaluator.keep_images = keeper
    with console.status(f"{trained.label}: {sampling.canonical()}"):
        evaluation = evaluator.evaluate(trained.model, trained.diffusion, sampling, folder=work)
    if keeper is not None:
        keeper.close()
    name = f"images-{trained.images_seen:09d}-{trained.ema}-{identity}"
    pictures = {f"{name}.png": evaluation.grid_png}
    if how.memorised:
        nearest = evaluator.nearest_picture(trained.model, trained.diffusion, sampling, work, how.memorised)
        pictures[f"{name}-nearest.png"] = nearest
    for file, png in pictures.items():
        if png is not None:
            place = storage.join(trained.run_folder, "samples", file)
            storage.write_bytes(place, png)
            console.print(f"picture: {place}", soft_wrap=True)
    columns = trained.columns | {"evaluated_on": "own workers"}
    records = [make_record(columns, m, sampling, trained.diffusion, trained.ema) for m in evaluation.measurements]
    for record in records:
        write_record(trained.run_folder, record)
    shutil.rmtree(work)
    return [json.loads(record.model_dump_json()) for record in records]


def _keeper(trained: Trained, sampling: Sampling, how: How) -> Keeper:
    d = trained.dataset
    folder = Path(how.keep).resolve() / f"{trained.images_seen:09d}-{trained.ema}-{sampling.solver_name}"
    source = {"run_id": trained.columns["run_id"], "sampler": sampling.canonical(), "seed": sampling.seed}
    return Keeper(folder, how.keep_format, (d.channels, d.resolution, d.resolution), d.class_names, source)


def _folder_rows(target: str, metrics: str, resize: str, how: How) -> list[dict[str, Any]]:
    if not how.reference:
        expected = "a dataset, a folder of images, or an .npz of statistics to compare with"
        raise UserError(setting="reference", value=how.reference, expected=expected)
    place = how.reference if storage.is_remote(how.reference) else str(Path(how.reference).resolve())
    actors, device = 0, "cpu"
    if how.workers > 1:
        connect()
        actors, device = devices(how.workers)
    evaluation = evaluate_folder(
        target,
        place,
        metrics.split(","),
        resize=resize,
        actors=actors,
        device=device,
        classes=how.per_class,
        memorised=how.memorised,
    )
    if evaluation.nearest_png is not None:
        picture = Path(f"{Path(target).stem}-nearest.png").resolve()
        storage.write_bytes(str(picture), evaluation.nearest_png)
        console.print(f"nearest images of the reference: {picture}", soft_wrap=True)
    return [m.fields() for m in evaluation.measurements]


def _show(rows: list[dict[str, Any]]) -> None:
    table = Table(box=None, header_style="bold")
    what = [name for name in WHAT if len({r.get(name) for r in rows}) > 1]  # tells one evaluation from another
    for title in (*what, "metric", "value", "95 % interval", "held out", "n", "against"):
        left = title in ("metric", "ema", "solver")
        table.add_column(title.replace("_", " "), justify="left" if left else "right", no_wrap=title == "metric")
    for r in rows:
        low, high, held = r["value_low"], r["value_high"], r["value_heldout"]
        interval = "" if low is None else f"{low:.4g} .. {high:.4g}"
        cells = [f"{r[name]:,}" if isinstance(r[name], int) else str(r[name]) for name in what]
        cells += [r["metric"], f"{r['value']:.5g}", interval, "" if held is None else f"{held:.5g}"]
        table.add_row(*cells, f"{r['n_generated']:,}", f"{r['n_reference']:,}" if r["n_reference"] else "?")
    console.print(table)
    for warning in sorted({r["warning"] for r in rows if r["warning"] and "[" not in r["metric"]}):
        console.print(f"[yellow]note:[/] {warning}", soft_wrap=True)


if __name__ == "__main__":
    run_app(app)
