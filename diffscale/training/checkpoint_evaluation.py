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
        sampling = self.evaluator.sampling(
            build_solver(self.experiment), precision=precision, carries_state=self.experiment.carries_state
        )
        return replace(sampling, labels=labels, batch=self._sample_batch(sampling))

    def _sample_batch(self, sampling: Sampling) -> int:
        """Return the sampler's batch: where `eval.batch` is auto, what fits the smallest GPU of the ranks.

        Twice the images are in a pass of classifier-free guidance.
        """
        device = torch.device(self.evaluator.device)
        if self.experiment.eval.batch != "auto" or device.type != "cuda" or not torch.cuda.is_available():
            return sampling.batch
        dataset = self.dataset
        with_labels = self.experiment.num_classes(dataset)
        peak = peak_bytes(
            lambda: build_model(self.experiment, dataset), dataset.resolution, dataset.channels, with_labels
        )
        twice = 1 if sampling.guidance.scale == 1 else 2
        batch = batch_that_fits(torch.cuda.get_device_properties(device).total_memory, peak * twice)
        return max(min(*self.world.gather(batch), batch, self.experiment.eval.n_generated), 1)

    def evaluate(
        self,
        model: nn.Module,
        columns: dict[str, Any],
        *,
        run_folder: str,
        evaluated_on: str,
        ema: str | None = None,
        sampling: Sampling | None = None,
        **options: Any,
    ) -> list[Record]:
        """Evaluate a network that carries the weights of `ema` (default: those of eval.ema); see evaluate_checkpoint.

        columns: the record's columns that training determines. options: further arguments of evaluate_checkpoint.
        """
        val_loss, by_logsnr = self.validation_loss(model)
        if "work" not in options and not storage.is_remote(run_folder):
            options["work"] = Path(run_folder)  # every node sees it, so any of them can continue the evaluation
        return evaluate_checkpoint(
            self.evaluator,
            model,
            self.diffusion,
            sampling or self.sampling(),
            columns | {"val_loss": val_loss, "val_loss_by_logsnr": by_logsnr},
            ema=ema or self.ema,
            run_folder=run_folder,
            evaluated_on=evaluated_on,
            **options,
        )

    def averaged(self, learner: Learner) -> nn.Module:
        """Return the network with the learner's averaged weights (a collective call where they are sharded)."""
        self._model = self._model or self._network()
        parameters = dict(learner.model.named_parameters())
        average = learner.ema.averages.get(self.ema)
        target = self._model.state_dict()
        with torch.no_grad():
            for name, tensor in learner.model.state_dict().items():
                if average is not None and name in average:
                    tensor = sharded_like(parameters[name], average[name])
                target[name].copy_(gather_full(tensor))
        return self._model

    def stored(self, checkpoint: str) -> nn.Module:
        """Return the network with the averaged weights of a checkpoint. Raises CheckpointDamaged."""
        self._model = self._model or self._network()
        self._model.load_state_dict(ck.read_weights(checkpoint, self.ema))
        return self._model

    def _network(self) -> nn.Module:
        model = build_model(self.experiment, self.dataset).to(self.world.device).eval().requires_grad_(False)
        return replace(self.numerics, compile=False).prepare(model)

    @torch.no_grad()
    def validation_loss(self, model: nn.Module) -> tuple[float | None, list[float] | None]:
        """Return the mean loss on held-out images with fixed noise, and its means in quartiles of the noise level.

        The quartiles go from the lowest logsnr to the highest. None without held-out images. Each rank computes its
        share. The held-out images are those at the training resolution.
        """
        held = self.dataset.heldout
        if held is None:
            return None, None
        model.to(self.world.device)
        n, batch = min(held.n, VALIDATION_IMAGES), given_batch(self.experiment.eval)
        first, last = self.world.share(n)
        sums = torch.zeros(2, QUARTILES, dtype=torch.float64, device=self.world.device)
        with _threads(self.experiment.train.cpus_per_worker):
            for start in range(first, last, batch):
                positions = torch.arange(start, min(start + batch, last))
                stored, labels = held.gather(positions.numpy())
                images = stored.permute(0, 3, 1, 2).float() / 127.5 - 1 if not held.is_latent else stored.float()
                place = positions.to(self.world.device)
                u = ((place * 0.6180339887498949) % 1).float().clamp(1e-4, 1 - 1e-4)  # spread evenly, whatever n is
                noise = normal(0, Stream.VALIDATION, place, tuple(images.shape[1:]))
                label = labels.to(self.world.device) if getattr(model, "num_classes", 0) else None
                with self.numerics.autocast(self.world.device):
                    terms = training_loss(
                        self.diffusion, model, images.to(self.world.device), u=u, noise=noise, label=label
                    )
                quartile = QUARTILES - 1 - (u * QUARTILES).long().clamp(max=QUARTILES - 1)
                sums[0].index_add_(0, quartile, terms.loss.double())
                sums[1].index_add_(0, quartile, torch.ones_like(terms.loss, dtype=torch.float64))
        total, count = self.world.sum(sums).cpu()
        return float(total.sum() / count.sum()), (total / count.clamp(min=1)).tolist()


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """Compute with the threads of a training worker, since sums depend on their number."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def sampling_precision(numerics: Numerics) -> str:
    """Precision in which samples of a run are drawn: bf16 where it trained in bf16, else fp32."""
    return "bf16" if numerics.precision == "bf16" else "fp32"


class RunEvaluations:
    """The evaluations of one launch at its run's points, by the training workers or by a separate task.

    All ranks make the same calls. `evaluate` and `run_missing` return whether the run must end.
    """

    def __init__(
        self,
        experiment: Experiment,
        run_folder: str,
        dataset: Dataset,
        diffusion: Diffusion,
        world: World,
        numerics: Numerics,
        values: dict[int, float],
        submit: Callable[[int], None] | None,
        on_records: Callable[[int, list[Record]], bool],
        stop_requested: StopRequested,
    ) -> None:
        """Construct the evaluator, or check on rank 0 that the separate task will be able to.

        values: images seen → the first metric's value, from earlier launches too.
        submit: has a separate task evaluate the checkpoint at this number of images, a collective call; None lets the
            training workers evaluate.
        on_records: called on rank 0 with images seen and the records of an evaluation; True ends the run.
        stop_requested: returns on rank 0 whether to stop.
        """
        self.experiment, self.run_folder, self.world = experiment, run_folder, world
        self.values, self.submit, self.on_records = values, submit, on_records
        self._submitted: set[int] = set()
        self.evaluator: CheckpointEvaluator | None = None
        if submit is not None:
            if world.rank == 0:
                make_evaluator(experiment, dataset, device=world.device)
        elif experiment.eval.n_generated:
            self.evaluator = CheckpointEvaluator(
                experiment, dataset, diffusion, world, numerics, stop_requested=stop_requested
            )

    def prepare(self) -> None:
        """Prepare what every evaluation needs from the dataset. Raises Stopped."""
        if self.evaluator is not None:
            self.evaluator.prepare()

    def evaluate(self, learner: Learner, columns: dict[str, Any]) -> bool:
        """Evaluate the current weights (their checkpoint is being written)."""
        if self.evaluator is not None:
            return self._by_workers(self.evaluator, self.evaluator.averaged(learner), columns)
        self._by_task(learner.images_seen)
        return False

    def run_missing(self, points: Iterable[int]) -> bool:
        """Evaluate checkpoints at `points` that earlier launches did not reach."""
        if self.evaluator is None and self.submit is None:
            return False
        missing = None
        if self.world.rank == 0:
            missing = missing_points(self.run_folder, self.experiment, points, self.values)
        for images in self.world.from_first(missing):
            if self.evaluator is None:
                self._by_task(images)
                continue
            checkpoint = ck.folder_of(self.run_folder, images)
            columns = self.world.from_first(ck.read_state(checkpoint)["record"])
            if self._by_workers(self.evaluator, self.evaluator.stored(checkpoint), columns):
                return True
        return False

    def retain(self, have: list[int], points: Iterable[int]) -> set[int]:
        """Return which checkpoints at `have` rotation must keep for their value.

        They are the best ones, those at points, and those that the separate task has not evaluated yet.
        """
        settings = self.experiment.train.checkpoint
        values = self.values if self.submit is None else evaluated_points(self.run_folder, self.experiment)
        finite = [i for i in have if math.isfinite(values.get(i, math.nan))]
        metrics = self.experiment.eval.metrics
        sign = -1 if metrics and higher_is_better(parse_metric(metrics[0]).name) else 1
        best = sorted(finite, key=lambda i: sign * values[i])
        kept = {*best[: settings.keep_best]} | (self._submitted - set(values))
        if settings.keep_points:
            kept |= {*points} | set(values)
        return kept.intersection(have)

    def _by_workers(self, evaluator: CheckpointEvaluator, model: nn.Module, columns: dict[str, Any]) -> bool:
        images, stop = columns["images_seen"], False
        records = evaluator.evaluate(model, columns, run_folder=self.run_folder, evaluated_on="training workers")
        if self.world.rank == 0:
            if records:
                self.values[images] = records[0].value
            stop = self.on_records(images, records)
        return self.world.from_first(stop)

    def _by_task(self, images: int) -> None:
        if self.submit is not None:
            self._submitted.add(images)
            self.submit(images)


def evaluated_points(run_folder: str, experiment: Experiment) -> dict[int, float]:
    """Return the images seen at which there are records, with the first metric's value under the run's own settings.

    The value is nan where the checkpoint was evaluated under other settings only.
    """
    found: dict[int, float] = {}
    settings, ema = experiment.eval, ema_name(experiment.eval.ema)
    name = parse_metric(settings.metrics[0]).name if settings.metrics else ""
    names = {name, f"{name}_{settings.resize}"}
    for uri in storage.list_files(storage.join(run_folder, "records"), ".json"):
        row = json.loads(storage.read_bytes(uri))
        own = row["metric"] in names and row["n_generated"] == settings.n_generated and row["ema"] == ema
        value = float(row["value"]) if own else math.nan
        if math.isnan(found.get(row["images_seen"], math.nan)):
            found[row["images_seen"]] = value
    return found


def missing_points(
    run_folder: str, experiment: Experiment, points: Iterable[int], done: Iterable[int] = ()
) -> list[int]:
    """Return the points whose weights are kept and that have no record, oldest first, without those in `done`."""
    if not experiment.eval.metrics:
        return []
    left = {*points} - {*done} - {*evaluated_points(run_folder, experiment)}
    return [i for c in ck.list_checkpoints(run_folder) if (i := ck.images_of(c)) in left and group_files(c, "model")]


def record_columns(
    experiment: Experiment,
    dataset: Dataset,
    cost: Cost,
    world: World,
    images_seen: int,
    device_seconds: float,
    energy_joules: float | None,
    train_loss: float | None,
    precision: str,
    launches: int | None,
) -> dict[str, Any]:
    """Return the columns of a record that training determines, by name, as plain JSON values.

    They are kept in each checkpoint too, for later evaluations. Training uses one device per worker.

    precision: what the run computes in ("auto" resolved).
    launches: number of times that training was started or resumed.
    """
    d, train = experiment.diffusion, experiment.train
    commit, dirty = source()
    path = experiment.data.path
    return {
        "run_id": experiment.run_id(dataset.content_hash),
        "run_name": experiment.name,
        "model": experiment.model.name,
        "parameters": cost.parameters,
        "schedule": d.schedule.name,
        "interpolant": d.interpolant,
        "prediction": d.prediction,
        "weighting": d.weighting.name,
        "input_scale": d.input_scale,
        "dataset": path if ":" in path and "/" not in path else path.rstrip("/").rpartition("/")[2],
        "dataset_hash": dataset.content_hash,
        "dataset_lossy": dataset.lossy,
        "train_resolution": dataset.resolution,
        "seed": train.seed,
        "global_batch": train.global_batch,
        "precision": precision,
        "images_seen": images_seen,
        "epochs": images_seen / dataset.n,
        "endpoint": experiment.endpoint(images_seen),
        "forward_macs": cost.forward_macs,
        "flops_per_image": cost.flops_per_image,
        "train_flops": cost.flops_per_image * images_seen,
        "device_seconds": device_seconds,
        "device": device_name(world.device),
        "devices": world.size,
        "launches": launches,
        "energy_joules": energy_joules,
        "cost": money(device_seconds, train.price_per_device_hour),
        "train_loss": train_loss,
        "commit": commit,
        "dirty": dirty,
        "versions": versions(),
        "settings": experiment.dotted(),
    }


def make_record(
    columns: dict[str, Any], measurement: Measurement, sampling: Sampling, diffusion: Diffusion, ema: str
) -> Record:
    """Build one record from the columns that training, evaluation and sampling each determine."""
    fields = measurement.fields() | sampling.fields(diffusion)
    identity = record_id(
        run_id=columns["run_id"],
        images_seen=columns["images_seen"],
        ema=ema,
        sampler=fields["sampler"],
        n_generated=fields["n_generated"],
        sample_seed=fields["sample_seed"],
        reference=fields["reference"],
        metric=fields["metric"],
        eval_resolution=fields["eval_resolution"],
    )
    created = dt.datetime.now(dt.UTC).isoformat(timespec="seconds")
    flops = fields["nfe"] * 2 * columns["forward_macs"]
    return Record(record_id=identity, created=created, ema=ema, sampling_flops=flops, **columns, **fields)
