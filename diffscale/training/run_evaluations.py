"""The evaluations of one launch of a run at its points, by the training workers or by a separate task."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

from diffscale.config.experiment import Experiment
from diffscale.data import Dataset
from diffscale.diffusion import Diffusion
from diffscale.evaluation import make_evaluator
from diffscale.evaluation.distribute import StopRequested
from diffscale.records.schema import Record, rank
from diffscale.training.checkpoint import layout as ck
from diffscale.training.checkpoint_evaluation import CheckpointEvaluator
from diffscale.training.ema import Weights
from diffscale.training.learner import Learner
from diffscale.training.numerics import Numerics
from diffscale.training.own_records import evaluated_points, first_metric, missing_points
from diffscale.training.parallel import World


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
        on_picture: Callable[[int, str], None],
        stop_requested: StopRequested,
    ) -> None:
        """Construct the evaluator, or check on rank 0 that the separate task will be able to.

        values: images seen → the first metric's value, from earlier launches too. One under other settings becomes
            nan: its point is done, but it is not compared.
        submit: has a separate task evaluate the checkpoint at this number of images, a collective call; None lets the
            training workers evaluate.
        on_records: called on rank 0 with images seen and the records of an evaluation; True ends the run.
        on_picture: called on rank 0 with images seen and the URI of a picture of an evaluation.
        stop_requested: returns on rank 0 whether to stop.
        """
        self.experiment, self.run_folder, self.world = experiment, run_folder, world
        self.values, self.submit, self.on_records = values, submit, on_records
        self.on_picture = on_picture
        if world.rank == 0 and values:  # an earlier launch may have evaluated under other settings
            own = evaluated_points(run_folder, experiment)
            values.update({images: own.get(images, math.nan) for images in values})
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
        metric = first_metric(self.experiment)
        best = sorted(finite, key=lambda i: rank(metric, values[i]))
        kept = {*best[: settings.keep_best]} | (self._submitted - set(values))
        if settings.keep_points:
            kept |= {*points} | set(values)
        return kept.intersection(have)

    def _by_workers(self, evaluator: CheckpointEvaluator, weights: Weights, columns: dict[str, Any]) -> bool:
        images, stop = columns["images_seen"], False
        train = self.experiment.train
        records = evaluator.evaluate(
            weights,
            columns,
            run_folder=self.run_folder,
            evaluated_on="training workers",
            trajectories=train.tracker.trajectories if train.trackers else 0,
            on_picture=lambda uri: self.on_picture(images, uri),
        )
        if self.world.rank == 0:
            if records:
                self.values[images] = records[0].value
            stop = self.on_records(images, records)
        return self.world.from_first(stop)

    def _by_task(self, images: int) -> None:
        if self.submit is not None:
            self._submitted.add(images)
            self.submit(images)
