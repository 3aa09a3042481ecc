"""Evaluation of checkpoints: samples, metrics, validation loss and the records of one set of averaged weights.

`evaluate_checkpoint` is the only function that turns weights into records. Training (`run_evaluations.py`), the
separate evaluation task, `evaluate`, `ema --sweep` and the benchmark's peers all call it, so their records agree in
every column but the time and the place of the evaluation.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from diffscale.config.experiment import Experiment
from diffscale.config.factory import build_model
from diffscale.core import storage
from diffscale.core.cache import cache_dir, file_lock
from diffscale.core.errors import UserError
from diffscale.core.hashing import identify
from diffscale.core.text import one_line
from diffscale.data import Dataset
from diffscale.diffusion import Diffusion
from diffscale.evaluation import Evaluator, Sampling, make_evaluator
from diffscale.evaluation.sampling import batch_that_fits, given_batch, sampling_precision
from diffscale.evaluation.trajectories import trajectories as trajectories_picture
from diffscale.models.cost import peak_bytes
from diffscale.records.schema import Record
from diffscale.records.store import write_record
from diffscale.training.checkpoint import layout as ck
from diffscale.training.checkpoint.state import local_shard
from diffscale.training.ema import Weights, ema_name
from diffscale.training.guide import load_guide, with_guide
from diffscale.training.learner import Learner
from diffscale.training.numerics import Numerics
from diffscale.training.own_records import own_sampling
from diffscale.training.parallel import World, shard
from diffscale.training.record_columns import make_record, with_evaluation_settings
from diffscale.training.validation_loss import validation_loss


def evaluate_checkpoint(
    evaluator: Evaluator,
    weights: Weights,
    diffusion: Diffusion,
    sampling: Sampling,
    columns: dict[str, Any],
    *,
    run_folder: str,
    evaluated_on: str,
    work: Path | None = None,
    locks: Path | None = None,
    grid_suffix: bool = False,
    nearest: int = 0,
    trajectories: int = 0,
    on_picture: Callable[[str], None] = lambda uri: None,
) -> list[Record]:
    """Evaluate one set of weights and write its records and sample grid into the run's folder.

    Every rank of the evaluator calls it. Rank 0 returns the records, the other ranks an empty list.

    weights: the network, and the name of the average that it carries, which the records state.
    columns: the record's columns that training determines (`record_columns`), with val_loss and val_loss_by_logsnr.
    evaluated_on: "training workers" or "own workers".
    work: folder that keeps the features of an interrupted evaluation, in a sub-folder named after the evaluation's
        identity; None keeps them in a temporary folder. A remote run's folder keeps them too, for other machines.
    locks: folder of lock files, where another process may do the same evaluation in `work`: the second waits.
    grid_suffix: name the grid after its average and sampler too, for evaluations that are not the run's own.
    nearest: number of samples in a second picture that shows each next to the training image nearest to it.
    trajectories: number of samples in a picture of their way from noise to image.
    on_picture: called with the URI of each picture.
    """
    images, ema = columns["images_seen"], weights.ema
    identity = identify(
        run=columns["run_id"],
        images=images,
        ema=ema,
        sampler=sampling.canonical(),
        seed=sampling.seed,
        batch=sampling.batch,
        keeps_images=evaluator.keep_images is not None,
        evaluator=evaluator.identity(),
    )
    folder = None if work is None else work / f"evaluating-{images:09d}-{identity}"
    kept = None
    if folder is not None and storage.is_remote(run_folder):
        kept = storage.join(run_folder, folder.name)
    samples = evaluator.samples(weights.model, diffusion, sampling)
    with file_lock(locks / identity, "the same evaluation") if locks else nullcontext():
        try:
            evaluation = evaluator.evaluate_source(samples, folder=folder, kept=kept)
        except torch.OutOfMemoryError as error:  # another attempt would meet it again
            raise _does_not_fit(sampling.batch, error) from None
        if evaluator.rank:
            if trajectories and samples.sharded:  # rank 0 draws them with the weights of all
                trajectories_picture(samples, trajectories)
            return []
        name = f"images-{images:09d}" + (f"-{ema}-{identity}" if grid_suffix else "")
        pictures = {f"samples/{name}.png": evaluation.grid_png}
        if nearest and folder is not None:
            pictures[f"samples/{name}-nearest.png"] = evaluator.nearest_picture(samples, folder, nearest)
        if trajectories:
            pictures[f"trajectories/{name}.png"] = trajectories_picture(samples, trajectories)
        for file, png in pictures.items():
            if png is not None:
                uri = storage.join(run_folder, file)
                storage.write_bytes(uri, png)
                on_picture(uri)
        columns = columns | {"evaluated_on": evaluated_on}
        records = [
            make_record(columns, one, sampling, diffusion, ema, evaluator.decoder) for one in evaluation.measurements
        ]
        for record in records:
            write_record(run_folder, record)
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)
        if kept is not None:
            storage.delete_folder(kept)
    return records


def _does_not_fit(batch: int, error: Exception) -> UserError:
    return UserError(
        setting="eval.batch",
        value=batch,
        expected="fewer images at a time",
        reason=f"the memory was full while samples were drawn and measured: {one_line(error)}",
        fix=f"eval.batch={max(batch // 2, 1)}",
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
        """Load the metrics' networks and the guide. options: further arguments of Evaluator, such as `actors`."""
        experiment = with_guide(experiment)
        self.guide = load_guide(experiment, dataset)
        self.experiment, self.dataset, self.diffusion, self.world = experiment, dataset, diffusion, world
        self.numerics = numerics
        self.ema = ema_name(experiment.eval.ema)
        device = options.pop("device", world.device)
        if world.size > 1:
            options |= {"gather": world.gather, "to_first": world.to_first}
        self.evaluator = make_evaluator(
            experiment, dataset, device=device, rank=world.rank, world=world.size, **options
        )
        self._model: nn.Module | None = None

    def prepare(self) -> None:
        """Compute the reference's features unless another run left them: an hour for 50,000 images on two cores."""
        self.evaluator.prepare()

    def sampling(self, precision: str = "", labels: str = "train") -> Sampling:
        """Sampler of the settings. precision: fp32 or bf16; empty for the precision of the run's numerics."""
        precision = precision or sampling_precision(self.numerics.precision)
        sampling = own_sampling(self.experiment, precision)
        if self.guide is not None:
            sampling = self.guide.guiding(sampling)
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
        weights: Weights,
        columns: dict[str, Any],
        *,
        run_folder: str,
        evaluated_on: str,
        sampling: Sampling | None = None,
        **options: Any,
    ) -> list[Record]:
        """Evaluate one set of the run's weights; see evaluate_checkpoint.

        columns: the record's columns that training determines. options: further arguments of evaluate_checkpoint.
        """
        settings = self.experiment
        val_loss, by_logsnr = validation_loss(
            weights.model,
            self.dataset.heldout,
            self.diffusion,
            self.numerics,
            self.world,
            batch=given_batch(settings.eval),
            threads=settings.train.cpus_per_worker,
        )
        if "work" not in options:
            # A local folder is seen by every node. A remote one is copied to where the evaluation continues.
            options["work"] = cache_dir() / "evaluations" if storage.is_remote(run_folder) else Path(run_folder)
        return evaluate_checkpoint(
            self.evaluator,
            weights,
            self.diffusion,
            sampling or self.sampling(),
            with_evaluation_settings(columns, settings, weights.ema)
            | {"val_loss": val_loss, "val_loss_by_logsnr": by_logsnr},
            run_folder=run_folder,
            evaluated_on=evaluated_on,
            **options,
        )

    def averaged(self, learner: Learner) -> Weights:
        """Return the network with the learner's averaged weights, sharded as the learner's are.

        Raises UserError where training does not track the average.
        """
        self._model = self._model or self._network()
        target = {name: local_shard(tensor) for name, tensor in self._model.state_dict().items()}
        with torch.no_grad():
            for name, tensor in learner.model.state_dict().items():
                target[name].copy_(local_shard(tensor))
        if self.ema != "none":
            learner.ema.copy_to(self.ema, target)
        return Weights(self._model, self.ema)

    def stored(self, checkpoint: str) -> Weights:
        """Return the network with the averaged weights of a checkpoint. Raises CheckpointDamaged."""
        self._model = self._model or self._network()
        ck.load_weights(self._model, checkpoint, self.ema)
        return Weights(self._model, self.ema)

    def _network(self) -> nn.Module:
        """Return a network of the run's, whose weights are sharded where those of the training are."""
        train = self.experiment.train
        sharded = train.sharded and self.world.size > 1
        model = build_model(self.experiment, self.dataset).to(self.world.device).eval().requires_grad_(False)
        replace(self.numerics, compile=False).prepare(model, to_shard=sharded)
        if sharded:  # sampling chooses its precision by autocast, so the weights are gathered in float32
            shard(model, self.world, "fp32", within_nodes=train.parallel == "hsdp")
        return model
