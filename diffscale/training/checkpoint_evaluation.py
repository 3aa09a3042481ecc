"""Evaluation at the compute points of a run, by the training workers or beside them: samples, values, validation loss,
records."""

from __future__ import annotations

import datetime as dt
import json
import math
import shutil
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from diffscale.config.experiment import Experiment
from diffscale.config.factory import build_model, build_solver
from diffscale.core import storage
from diffscale.core.keyed_random import Stream, normal
from diffscale.data import Dataset
from diffscale.diffusion import Diffusion, training_loss
from diffscale.evaluation import Evaluator
from diffscale.evaluation.distribute import Asked
from diffscale.evaluation.image_sources import Sampling
from diffscale.evaluation.metrics.registry import Measurement, parse_metric
from diffscale.records.store import Record, identify, record_id, write_record
from diffscale.training.checkpoint import layout as ck
from diffscale.training.checkpoint.tensors import group_files
from diffscale.training.ema import ema_name
from diffscale.training.learner import QUARTILES, Learner
from diffscale.training.numerics import Numerics
from diffscale.training.parallel import World
from diffscale.training.sharding import like, whole

VALIDATION_IMAGES = 1024


class Judge:
    """Made before the first step, so that missing weights or metrics stop a run before it has cost anything.

    asked: whether to stop; then `prepare` and `judge` raise Stopped on every rank, and lose nothing. Its model is a
    second copy of the network that carries the averaged weights, on every rank.
    """

    def __init__(
        self,
        experiment: Experiment,
        dataset: Dataset,
        diffusion: Diffusion,
        world: World,
        numerics: Numerics,
        asked: Asked = lambda: False,
    ) -> None:
        self.experiment, self.dataset, self.diffusion, self.world = experiment, dataset, diffusion, world
        self.numerics = numerics
        self.ema = ema_name(experiment.eval.ema)
        self.evaluator = make_evaluator(experiment, dataset, world, asked)
        self._model: nn.Module | None = None

    def prepare(self) -> None:
        """The reference's features, where no other run has left them: an hour for 50,000 images on two cores."""
        self.evaluator.prepare()

    def judge(self, model: nn.Module, run_folder: str, columns: dict[str, Any], evaluated_on: str) -> list[Record]:
        """Evaluates a network that carries averaged weights, writes the records and the sample grid; gives the records
        on rank 0.

        `columns`: those of a Record that training determines, with forward_macs.
        """
        val_loss, by_logsnr = self.validation_loss(model)
        precision = "bf16" if self.numerics.precision == "bf16" else "fp32"
        sampling = self.evaluator.sampling(build_solver(self.experiment), precision=precision)
        place = self._place(run_folder, columns["images_seen"], sampling)
        evaluation = self.evaluator.evaluate(model, self.diffusion, sampling, folder=place)
        if self.world.rank:
            return []
        if evaluation.grid_png is not None:
            name = f"images-{columns['images_seen']:09d}.png"
            storage.write_bytes(storage.join(run_folder, "samples", name), evaluation.grid_png)
        columns = columns | {"val_loss": val_loss, "val_loss_by_logsnr": by_logsnr, "evaluated_on": evaluated_on}
        records = [
            make_record(columns, measurement, sampling, self.diffusion, self.ema)
            for measurement in evaluation.measurements
        ]
        for record in records:
            write_record(run_folder, record)
        if place is not None:
            shutil.rmtree(place, ignore_errors=True)
        return records

    def _place(self, run_folder: str, images_seen: int, sampling: Sampling) -> Path | None:
        """Where the features of this evaluation go, so that one that is cut off goes on: in the run's folder. Samples
        are a function of the checkpoint and the sampler. A remote run's go to a temporary folder."""
        if storage.is_remote(run_folder):
            return None
        views = [str(view) for view in (*self.evaluator.views.values(), *self.evaluator.native.values())]
        identity = identify(
            images=images_seen,
            ema=self.ema,
            sampler=sampling.canonical(),
            seed=sampling.seed,
            batch=sampling.batch,
            views=views,
        )
        return Path(run_folder) / f"evaluating-{images_seen:09d}-{identity}"

    def averaged(self, learner: Learner) -> nn.Module:
        """The network with the averaged weights (a collective call where they are sharded)."""
        self._model = self._model or self._network()
        parameters = dict(learner.model.named_parameters())
        average = learner.ema.averages.get(self.ema)
        target = self._model.state_dict()
        with torch.no_grad():
            for name, tensor in learner.model.state_dict().items():
                if average is not None and name in average:
                    tensor = like(parameters[name], average[name])
                target[name].copy_(whole(tensor))
        return self._model

    def stored(self, checkpoint: str) -> nn.Module:
        """The network with the averaged weights of a checkpoint. Raises Damaged."""
        self._model = self._model or self._network()
        self._model.load_state_dict(ck.read_weights(checkpoint, self.ema))
        return self._model

    def _network(self) -> nn.Module:
        model = build_model(self.experiment, self.dataset).to(self.world.device).eval().requires_grad_(False)
        return replace(self.numerics, compile=False).prepare(model)

    @torch.no_grad()
    def validation_loss(self, model: nn.Module) -> tuple[float | None, list[float] | None]:
        """Loss on held-out images with fixed noise: the mean, and in quartiles of the noise level from the lowest
        logsnr to the highest. None where nothing is held out. Each rank computes its share."""
        held = self.dataset.heldout
        if held is None:
            return None, None
        n, batch = min(held.n, VALIDATION_IMAGES), self.experiment.eval.batch
        first, last = self.world.share(n)
        sums = torch.zeros(2, QUARTILES, dtype=torch.float64, device=self.world.device)
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


def make_evaluator(experiment: Experiment, dataset: Dataset, world: World, asked: Asked = lambda: False) -> Evaluator:
    """Loads the metrics' networks. Raises UserError where one is not to be had or the settings do not fit the data."""
    return Evaluator(
        experiment.eval,
        dataset,
        experiment.storage,
        heldout=dataset.heldout,
        device=world.device,
        rank=world.rank,
        world=world.size,
        gather=world.gather if world.size > 1 else None,
        at_eval_resolution=_at_eval_resolution(experiment),
        asked=asked,
    )


def judged(run_folder: str, experiment: Experiment) -> dict[int, float]:
    """Images seen at which there are records, and the first metric's value there under the run's own settings (nan
    where it was only evaluated under others)."""
    found: dict[int, float] = {}
    settings, ema = experiment.eval, ema_name(experiment.eval.ema)
    metric = parse_metric(settings.metrics[0]).name if settings.metrics else ""
    for uri in storage.list_files(storage.join(run_folder, "records"), ".json"):
        row = json.loads(storage.read_bytes(uri))
        ours = row["metric"].startswith(metric) and row["n_generated"] == settings.n_generated and row["ema"] == ema
        value = float(row["value"]) if ours else math.nan
        if math.isnan(found.get(row["images_seen"], math.nan)):
            found[row["images_seen"]] = value
    return found


def unjudged(run_folder: str, experiment: Experiment, points: Iterable[int], done: Iterable[int] = ()) -> list[int]:
    """Those of `points` whose weights are kept and which have no record, nor are among `done`, oldest first."""
    if not experiment.eval.metrics:
        return []
    left = {*points} - {*done} - {*judged(run_folder, experiment)}
    return [i for c in ck.list_checkpoints(run_folder) if (i := ck.images_of(c)) in left and group_files(c, "model")]


def make_record(
    columns: dict[str, Any], measurement: Measurement, sampling: Sampling, diffusion: Diffusion, ema: str
) -> Record:
    """One row from what training, evaluation and sampling each determine."""
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


def _at_eval_resolution(experiment: Experiment) -> Dataset | None:
    from diffscale.data import open_dataset, resolve

    resolution = experiment.eval.eval_resolution
    if resolution is None or resolution == experiment.data.resolution:
        return None
    return open_dataset(resolve(experiment.data.path, resolution, experiment.storage))
