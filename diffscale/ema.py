"""`python -m diffscale.ema RUN --std 0.07`: averages of any length from a finished run (EDM2's post-hoc EMA).

RUN is a run's folder that was trained with `train.ema.power` (two widths, 0.05 and 0.10, are enough). The result
goes beside the checkpoint, where `sample` and `evaluate` find it: `eval.ema=0.07`. `--sweep` makes one average for
each width of a range, evaluates them all and tells the best.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import numpy as np
import torch
import typer

from diffscale.core import storage
from diffscale.core.app import run_app
from diffscale.core.errors import UserError
from diffscale.training.checkpoint import layout as ck
from diffscale.training.checkpoint.tensors import Damaged, groups_in, read_group, write_group
from diffscale.training.ema import exponent, profile_error, profile_name, reconstruct

if TYPE_CHECKING:
    from diffscale.records.store import Record

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    run: Annotated[str, typer.Argument(metavar="RUN", help="a run's folder")],
    std: Annotated[list[float] | None, typer.Option(help="relative width; may be given several times")] = None,
    images: Annotated[int | None, typer.Option(help="images seen of the checkpoint; default: the newest")] = None,
    sweep: Annotated[bool, typer.Option("--sweep", help="evaluate widths .02 to .20 and tell the best")] = False,
) -> None:
    """Reconstruct averages of other lengths from the stored ones."""
    run = storage.check_absolute(run, "RUN")
    widths = list(std or ([0.02, 0.03, 0.045, 0.065, 0.09, 0.125, 0.17, 0.2] if sweep else []))
    if not widths:
        raise UserError(setting="--std", value=None, expected="at least one relative width, such as 0.07, or --sweep")
    target, error = make(run, widths, images)
    for width in widths:
        print(f"{profile_name(width)}: {target}/ema/{profile_name(width)}.safetensors  residual {error[width]:.2%}")
    if sweep:
        best = min(evaluated(target, widths), key=lambda record: record.value)
        print(f"best: {best.ema}  {best.metric} {best.value:.4g} with {best.n_generated} samples")


def make(run: str, widths: list[float], images: int | None = None) -> tuple[str, dict[float, float]]:
    """Writes the averages into the checkpoint; gives its place and, for each width, the residual of its profile.

    Raises UserError where the run has no such checkpoint or no power-function averages.
    """
    for width in widths:
        try:
            exponent(width)
        except ValueError as error:
            raise UserError(setting="--std", value=width, expected=str(error)) from None
    checkpoints = ck.list_checkpoints(run)
    if images is None:
        checkpoint = ck.newest_good(run, for_resuming=False)
    else:
        checkpoint = next((c for c in checkpoints if ck.images_of(c) == images), None)
    if checkpoint is None:
        known = ", ".join(str(ck.images_of(c)) for c in checkpoints) or "none"
        raise UserError(setting="RUN", value=run, expected=f"a run with a checkpoint; at images: {known}")
    until = ck.images_of(checkpoint)
    stored = _stored([c for c in checkpoints if ck.images_of(c) <= until])
    if not stored:
        raise UserError(
            setting="RUN",
            value=run,
            expected="a run trained with train.ema.power",
            fix="train with 'train.ema.power=[0.05,0.10]'",
        )
    files, residuals = ck.files_of(checkpoint), {}
    for width in widths:
        name = profile_name(width)
        weights = reconstruct([(w, t) for w, t, _ in stored], (width, until))
        residuals[width] = profile_error([(w, t) for w, t, _ in stored], (width, until), weights)
        if not any(f.startswith(f"ema/{name}.") for f in files):
            average = _combine(stored, weights)
            files |= write_group(checkpoint, f"ema/{name}", average, {}, 0, 1)
    ck.complete(checkpoint, files)
    return checkpoint, residuals


def _stored(checkpoints: list[str]) -> list[tuple[float, int, str]]:
    """(relative width, images seen, checkpoint) of every tracked average."""
    found = []
    for checkpoint in checkpoints:
        tracked = {profile_name(w) for w in _tracked(checkpoint)}
        try:
            ck.verify(checkpoint)
        except Damaged as error:
            print(f"left out: {error}")
            continue
        names = tracked.intersection(groups_in(storage.join(checkpoint, "ema")))
        found += [(float(n.removeprefix("std")), ck.images_of(checkpoint), checkpoint) for n in sorted(names)]
    return found


def _tracked(checkpoint: str) -> tuple[float, ...]:
    """Widths that training tracked; what this command made is not a source for more."""
    return ck.read_experiment(checkpoint).train.ema.power


def _combine(stored: list[tuple[float, int, str]], weights: np.ndarray) -> dict[str, torch.Tensor]:
    total: dict[str, torch.Tensor] = {}
    for (width, _, checkpoint), weight in zip(stored, weights, strict=True):
        if weight == 0:
            continue
        for name, tensor in read_group(checkpoint, f"ema/{profile_name(width)}").items():
            term = tensor.double() * float(weight)
            total[name] = term if name not in total else total[name].add_(term)
    return {name: tensor.float() for name, tensor in total.items()}


def evaluated(checkpoint: str, widths: list[float]) -> list[Record]:
    """The first metric of each average, evaluated as the run's settings say, as records of the run."""
    from diffscale.config.factory import build_diffusion, build_solver, open_training_data
    from diffscale.evaluation import Evaluator
    from diffscale.records.store import write_record
    from diffscale.training.checkpoint_evaluation import make_record

    experiment = ck.read_experiment(checkpoint)
    dataset = open_training_data(experiment)
    evaluator = Evaluator(experiment.eval, dataset, experiment.storage, heldout=dataset.heldout)
    diffusion = build_diffusion(experiment, dataset)
    out = []
    for width in widths:
        _, model, _, columns = ck.load_for_sampling(checkpoint, str(width))
        sampling = evaluator.sampling(build_solver(experiment))
        result = evaluator.evaluate(model, diffusion, sampling)
        columns = columns | {"evaluated_on": "own workers"}
        records = [make_record(columns, m, sampling, diffusion, profile_name(width)) for m in result.measurements]
        for record in records:
            write_record(checkpoint.rsplit("/checkpoints/", 1)[0], record)
        print(f"{profile_name(width)}: {records[0].metric} {records[0].value:.4g}", flush=True)
        out.append(records[0])
    return out


if __name__ == "__main__":
    run_app(app)
