"""Averages of any length from a finished run: EDM2's post-hoc EMA (Karras et al. 2024, section 3 and appendix C)."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import numpy as np
import torch

from diffscale.core import storage
from diffscale.core.errors import UserError
from diffscale.core.places import require_writable
from diffscale.core.progress import working
from diffscale.records.schema import Record, rank
from diffscale.training.checkpoint import layout as ck
from diffscale.training.checkpoint.tensors import CheckpointDamaged, groups_in, read_group, write_group
from diffscale.training.ema import exponent, profile_error, profile_name, reconstruct
from diffscale.training.evaluate_runs import EvaluateOptions, evaluate_trained
from diffscale.training.load import load_trained

log = logging.getLogger(__name__)

SWEEP_WIDTHS = (0.02, 0.03, 0.045, 0.065, 0.09, 0.125, 0.17, 0.2)


def make(run: str, widths: list[float], images: int | None = None) -> tuple[str, dict[float, float]]:
    """Write the averages into a checkpoint; return its folder and, for each width, the residual of its profile.

    Raises UserError where the run has no checkpoint there or no power-function averages.

    run: the run's folder, absolute.
    widths: relative widths of the averages (a power function's standard deviation as a share of training).
    images: images seen of the checkpoint; None for the newest undamaged one.
    """
    for width in widths:
        try:
            exponent(width)
        except ValueError as error:
            raise UserError(setting="--std", value=width, expected=str(error)) from None
    require_writable(run, "RUN")
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
    with working("reconstructing", len(widths), "averages") as work:
        for width in widths:
            name = profile_name(width)
            weights = reconstruct([(w, t) for w, t, _ in stored], (width, until))
            residuals[width] = profile_error([(w, t) for w, t, _ in stored], (width, until), weights)
            if not any(f.startswith(f"ema/{name}.") for f in files):
                average = _combine(stored, weights)
                files |= write_group(checkpoint, f"ema/{name}", average, {}, 0, 1)
            work.advance()
    ck.complete(checkpoint, files)
    return checkpoint, residuals


def sweep(
    checkpoint: str,
    widths: list[float],
    workers: int = 0,
    on_record: Callable[[Record], None] = lambda record: None,
) -> Record:
    """Evaluate the averages of a checkpoint under the run's settings and return the first metric's record of the best.

    workers: Ray actors; 0 for one for each GPU, or else CPU, of the cluster.
    on_record: called with the first metric's record of each average.
    """
    firsts = []
    experiment = ck.read_experiment(checkpoint)
    with working("evaluating", len(widths), "averages") as work:
        for width in widths:
            work.note = profile_name(width)
            trained = load_trained(checkpoint, work.note, experiment)
            first = evaluate_trained(trained, EvaluateOptions(workers=workers))[0]
            on_record(first)
            firsts.append(first)
            work.advance()
    return best_of(firsts)


def best_of(records: Sequence[Record]) -> Record:
    """Return the record with the best value; one that is not finite is the worst. All are of one metric."""
    return min(records, key=lambda record: rank(record.metric, record.value))


def _stored(checkpoints: list[str]) -> list[tuple[float, int, str]]:
    """Return (relative width, images seen, checkpoint) of every tracked average; damaged checkpoints are left out."""
    found = []
    for checkpoint in checkpoints:
        tracked = {profile_name(w) for w in _tracked(checkpoint)}
        try:
            ck.verify(checkpoint)
        except CheckpointDamaged as error:
            log.warning("left out: %s", error)
            continue
        names = tracked.intersection(groups_in(storage.join(checkpoint, "ema")))
        found += [(float(n.removeprefix("std")), ck.images_of(checkpoint), checkpoint) for n in sorted(names)]
    return found


def _tracked(checkpoint: str) -> tuple[float, ...]:
    """Return the widths that training tracked; reconstructed averages are not a source for more."""
    return ck.read_experiment(checkpoint).train.ema.power


def _combine(stored: list[tuple[float, int, str]], weights: np.ndarray) -> dict[str, torch.Tensor]:
    """Return the weighted sum of the stored averages."""
    total: dict[str, torch.Tensor] = {}
    for (width, _, checkpoint), weight in zip(stored, weights, strict=True):
        if weight == 0:
            continue
        for name, tensor in read_group(checkpoint, f"ema/{profile_name(width)}").items():
            term = tensor.double() * float(weight)
            total[name] = term if name not in total else total[name].add_(term)
    return {name: tensor.float() for name, tensor in total.items()}
