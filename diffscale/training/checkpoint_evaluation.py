"""Evaluation of checkpoints: samples, metrics, validation loss and the records of one set of averaged weights.

`evaluate_checkpoint` is the only function that turns weights into records. Training (`RunEvaluations`), the separate
evaluation task, `evaluate`, `ema --sweep` and the benchmark's peers all call it, so their records agree in every
column but the time and the place of the evaluation.
"""

from __future__ import annotations

import datetime as dt
import json
import math
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from diffscale.config.experiment import Experiment
from diffscale.config.factory import build_model, build_solver
from diffscale.core import storage
from diffscale.core.device import device_name, money
from diffscale.core.hashing import identify
from diffscale.core.keyed_random import Stream, normal
from diffscale.core.provenance import source, versions
from diffscale.data import Dataset
from diffscale.diffusion import Diffusion, training_loss
from diffscale.evaluation import Evaluator, Measurement, Sampling, make_evaluator, parse_metric
from diffscale.evaluation.distribute import StopRequested
from diffscale.evaluation.sampling import batch_that_fits, given_batch
from diffscale.models.cost import Cost, peak_bytes
from diffscale.records.schema import Record, higher_is_better, record_id
from diffscale.records.store import write_record
from diffscale.training.checkpoint import layout as ck
from diffscale.training.checkpoint.state import gather_full, sharded_like
from diffscale.training.checkpoint.tensors import group_files
from diffscale.training.ema import ema_name
from diffscale.training.learner import QUARTILES, Learner
from diffscale.training.numerics import Numerics
from diffscale.training.parallel import World

VALIDATION_IMAGES = 1024


def evaluate_checkpoint(
    evaluator: Evaluator,
    model: nn.Module,
    diffusion: Diffusion,
    sampling: Sampling,
    columns: dict[str, Any],
    *,
    ema: str,
    run_folder: str,
    evaluated_on: str,
    work: Path | None = None,
    grid_suffix: bool = False,
    nearest: int = 0,
    on_picture: Callable[[str], None] = lambda uri: None,
) -> list[Record]:
    """Evaluate one set of weights and write its records and sample grid into the run's folder.

    Every rank of the evaluator calls it. Rank 0 returns the records, the other ranks an empty list.

    columns: the record's columns that training determines (`record_columns`), with val_loss and val_loss_by_logsnr.
    ema: name of the average that the model carries.
    evaluated_on: "training workers" or "own workers".
    work: folder that keeps the features of an interrupted evaluation, in a sub-folder named after the evaluation's
        identity; None keeps them in a temporary folder.
    grid_suffix: name the grid after its average and sampler too, for evaluations that are not the run's own.
    nearest: number of samples in a second picture that shows each next to the training image nearest to it.
    on_picture: called with the URI of each picture.
    """
    images = columns["images_seen"]
    identity = _identity(evaluator, columns, sampling, ema)
    folder = None if work is None else work / f"evaluating-{images:09d}-{identity}"
    samples = evaluator.samples(model, diffusion, sampling)
    evaluation = evaluator.evaluate_source(samples, folder=folder)
    if evaluator.rank:
        return []
    name = f"images-{images:09d}" + (f"-{ema}-{identity}" if grid_suffix else "")
    pictures = {f"{name}.png": evaluation.grid_png}
    if nearest and folder is not None:
        pictures[f"{name}-nearest.png"] = evaluator.nearest_picture(samples, folder, nearest)
    for file, png in pictures.items():
        if png is not None:
            uri = storage.join(run_folder, "samples", file)
            storage.write_bytes(uri, png)
            on_picture(uri)
    columns = columns | {"evaluated_on": evaluated_on}
    records = [make_record(columns, measurement, sampling, diffusion, ema) for measurement in evaluation.measurements]
    for record in records:
        write_record(run_folder, record)
    if folder is not None:
        shutil.rmtree(folder, ignore_errors=True)
    return records


def _identity(evaluator: Evaluator, columns: dict[str, Any], sampling: Sampling, ema: str) -> str:
    """Hash of everything that determines the features of an evaluation's samples."""
    return identify(
        run=columns["run_id"],
        images=columns["images_seen"],
        ema=ema,
        sampler=sampling.canonical(),
        seed=sampling.seed,
        batch=sampling.batch,
        views=[str(view) for view in (*evaluator.views.values(), *evaluator.native.values())],
        keeps_images=evaluator.keep_images is not None,
    )


class CheckpointEvaluator:
    """Evaluates checkpoints of one run under its settings.

    Constructed before the first step so that missing weights or metrics fail fast (UserError). All ranks construct it
    and make the same calls. A requested stop raises Stopped on every rank; finished chunks are kept.
    """

    def __init__(
        self,
        experiment: Experiment,
        dataset: Dataset,
        diffusion: Diffusion,
        world: World,
        numerics: Numerics,
        **options: Any,
    ) -> None:
        """Load the metrics' networks. options: further arguments of Evaluator, such as `actors`."""
        self.experiment, self.dataset, self.diffusion, self.world = experiment, dataset, diffusion, world
        self.numerics = numerics
        self.ema = ema_name(experiment.eval.ema)
        device = options.pop("device", world.device)
        gather = world.gather if world.size > 1 else None
        self.evaluator = make_evaluator(
            experiment, dataset, device=device, rank=world.rank, world=world.size, gather=gather, **options
        )
        self._model: nn.Module | None = None

    def prepare(self) -> None:
        """Compute the reference's features unless another run left them: an hour for 50,000 images on two cores."""
        self.evaluator.prepare()

    def sampling(self, precision: str = "", labels: str = "train") -> Sampling:
        """Sampler of the settings. precision: fp32 or bf16; empty for the precision of the run's numerics."""
        precision = precision or sampling_precision(self.numerics)
