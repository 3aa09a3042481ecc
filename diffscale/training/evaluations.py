"""The evaluations of one launch at its run's points: by its ranks, or by a task beside them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

from diffscale.config.experiment import Experiment
from diffscale.data import Dataset
from diffscale.diffusion import Diffusion
from diffscale.evaluation.distribute import Asked
from diffscale.records.store import Record
from diffscale.training.checkpoint import layout as ck
from diffscale.training.checkpoint_evaluation import Judge, judged, make_evaluator, unjudged
from diffscale.training.learner import Learner
from diffscale.training.numerics import Numerics
from diffscale.training.parallel import World


class Evaluations:
    """All ranks make the same calls. Those that evaluate say whether the run is to end.

    hand_over: has the checkpoint at so many images evaluated elsewhere, a collective call; without it the ranks do it.
    told: called on rank 0 with images seen and the records of an evaluation here; True ends the run.
    asked: whether to stop, on rank 0. values: images seen → the first metric's value, of earlier launches too.
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
        hand_over: Callable[[int], None] | None,
        told: Callable[[int, list[Record]], bool],
        asked: Asked,
    ) -> None:
        self.experiment, self.run_folder, self.world = experiment, run_folder, world
        self.values, self.hand_over, self.told = values, hand_over, told
        self._handed_over: set[int] = set()
        self.judge: Judge | None = None
        if hand_over is not None:
            if world.rank == 0:  # refuses what cannot be evaluated before it has cost anything
                make_evaluator(experiment, dataset, World(device=world.device))
        elif experiment.eval.n_generated:
            self.judge = Judge(experiment, dataset, diffusion, world, numerics, asked)

    def prepare(self) -> None:
        """What evaluating needs from the dataset. Raises Stopped."""
        if self.judge is not None:
            self.judge.prepare()

    def evaluate(self, learner: Learner, columns: dict[str, Any]) -> bool:
        """Of the learner's weights, which are being saved. columns: those of a record that training determines."""
        if self.judge is not None:
            return self._here(self.judge, self.judge.averaged(learner), columns)
        self._elsewhere(learner.images_seen)
        return False

    def make_up(self, points: Iterable[int]) -> bool:
        """Of the kept checkpoints at `points` to which earlier launches did not come."""
        if self.judge is None and self.hand_over is None:
            return False
        missing = unjudged(self.run_folder, self.experiment, points, self.values) if self.world.rank == 0 else None
        for images in self.world.from_first(missing):
            if self.judge is None:
                self._elsewhere(images)
                continue
            checkpoint = ck.folder_of(self.run_folder, images)
            columns = self.world.from_first(ck.read_state(checkpoint)["record"])
            if self._here(self.judge, self.judge.stored(checkpoint), columns):
                return True
        return False

    def keep(self, have: list[int], points: Iterable[int]) -> set[int]:
        """Which of the checkpoints at `have` rotation must leave for their value: the best ones, those at points, and
        those that are still to be evaluated."""
        settings = self.experiment.train.checkpoint
        values = self.values if self.hand_over is None else judged(self.run_folder, self.experiment)
        best = sorted((i for i in have if math.isfinite(values.get(i, math.nan))), key=lambda i: values[i])
        kept = {*best[: settings.keep_best]} | (self._handed_over - set(values))
        if settings.keep_points:
            kept |= {*points} | set(values)
        return kept.intersection(have)

    def _here(self, judge: Judge, model: nn.Module, columns: dict[str, Any]) -> bool:
        images, stop = columns["images_seen"], False
        records = judge.judge(model, self.run_folder, columns, "training workers")
        if self.world.rank == 0:
            if records:
                self.values[images] = records[0].value
            stop = self.told(images, records)
        return self.world.from_first(stop)

    def _elsewhere(self, images: int) -> None:
        if self.hand_over is not None:
            self._handed_over.add(images)
            self.hand_over(images)
