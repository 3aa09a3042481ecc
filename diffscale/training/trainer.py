"""One launch of a run on one rank: resumes from the newest good checkpoint, trains, evaluates, saves.

Nothing but the run's folder persists between two launches. Every decision (evaluate, save, stop) follows from numbers
that all ranks share, so all ranks make the same calls in the same order.
"""

from __future__ import annotations

import json
import logging
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from diffscale.config.experiment import Experiment
from diffscale.config.factory import build_diffusion, build_model, open_training_data
from diffscale.core import storage
from diffscale.core.device import EnergyMeter
from diffscale.data import Dataset, Loader, ShardError, create_loader
from diffscale.diffusion import Diffusion
from diffscale.distributed.messages import PHASE
from diffscale.evaluation.distribute import Stopped
from diffscale.kernels.runtime import configure_process
from diffscale.models.cost import Cost
from diffscale.records.schema import Record
from diffscale.training.checkpoint import layout as ck
from diffscale.training.checkpoint import saver as saving
from diffscale.training.checkpoint_evaluation import RunEvaluations, record_columns
from diffscale.training.control import REASONS, SIGNAL, StopRequests, Watchdog
from diffscale.training.fit import after_out_of_memory, fitted
from diffscale.training.initial_weights import start_from
from diffscale.training.learner import Learner, Step
from diffscale.training.metrics_log import History, Interval, Listener, MetricsLog, make_trackers
from diffscale.training.numerics import Numerics, settle_numerics
from diffscale.training.parallel import World, shard
from diffscale.training.plan import make_plan
from diffscale.training.spec import Outcome, Reason

log = logging.getLogger(__name__)

ShouldStop = Callable[[Record], bool]


@dataclass
class TrainState:
    """What a launch adds up, besides the learner's tensors. Checkpoints hold it in state.json."""

    device_seconds: float = 0.0  # of training alone, summed over the devices
    energy_before: float = 0.0  # joules of earlier launches
    skipped: int = 0  # steps whose loss or gradient was not finite
    skipped_in_row: int = 0
    loss_sum: float = 0.0  # since the last evaluation
    loss_steps: int = 0
    launches: int = 1
    bit_identical: bool = True  # whether an uninterrupted run would have the same weights to the bit
    interval: dict[str, Any] = field(default_factory=dict)  # of the history's unfinished row, at the checkpoint
    values: dict[int, float] = field(default_factory=dict)  # images seen → the first metric's value

    @classmethod
    def resumed(cls, stored: dict[str, Any]) -> TrainState:
        """Return the state of the launch after a checkpoint. stored: its state.json."""
        return cls(
            device_seconds=stored["device_seconds"],
            energy_before=stored["energy_joules"] or 0.0,
            skipped=stored["skipped"],
            skipped_in_row=stored["skipped_in_row"],
            loss_sum=stored["loss_sum"],
            loss_steps=stored["loss_steps"],
            launches=stored.get("launches", 1) + 1,
            bit_identical=stored["bit_identical"],
            interval=stored.get("interval") or {},
            values={int(images): value for images, value in stored["values"].items()},
        )

    def to_json(self, energy: float | None, interval: Interval | None) -> dict[str, Any]:
        """Return the part of state.json that `resumed` reads. energy: joules of all launches, None if unknown."""
        return {
            "device_seconds": self.device_seconds,
            "energy_joules": energy,
            "skipped": self.skipped,
            "launches": self.launches,
            "skipped_in_row": self.skipped_in_row,
            "loss_sum": self.loss_sum,
            "loss_steps": self.loss_steps,
            "interval": asdict(interval) if interval is not None else None,
            "values": {str(images): value for images, value in self.values.items()},
            "bit_identical": self.bit_identical,
        }

    def count(self, step: Step) -> None:
        """Add a step."""
        self.device_seconds = step.clock
        self.skipped += step.skipped
        self.skipped_in_row = self.skipped_in_row + 1 if step.skipped else 0
        if not (step.skipped or step.overflow):
            self.loss_sum, self.loss_steps = self.loss_sum + step.loss, self.loss_steps + 1

    def mean_loss(self) -> float | None:
        """Return the mean loss since the last evaluation."""
        return self.loss_sum / self.loss_steps if self.loss_steps else None


@dataclass
class LastSave:
    """The last checkpoint of this launch, or where the launch began."""

    images_seen: int
    device_seconds: float
    made: bool = False  # whether this launch has saved


class Trainer:
    """One launch of a run on one rank.

    `run` trains to the end of the launch and returns the same outcome on every rank. Benchmarks make single steps with
    `loader` and `advance`.
    """

    def __init__(
        self,
        experiment: Experiment,
        run_folder: str,
        world: World,
        cost: Cost,
        messages: Listener | None = None,
        *,
        should_stop: ShouldStop | None = None,
        stop_requested: Callable[[], bool] = lambda: False,
        submit: Callable[[int], None] | None = None,
    ) -> None:
        """Build the run and resume it from its newest good checkpoint.

        cost: of one training image
        messages: receives phases, progress and evaluations on rank 0
        should_stop: called on rank 0 with each new record; True ends the run early, at a checkpoint
        stop_requested: returns on rank 0 whether the run must stop at a checkpoint
        submit: has a separate task evaluate the checkpoint at a number of images; see RunEvaluations
        """
        self.experiment, self.run_folder, self.world, self.cost = experiment, run_folder, world, cost
        self.messages, self.should_stop = messages, should_stop
        self.stops = StopRequests(stop_requested, experiment.train.wall_seconds)
        self._phase("loading")
        configure_process(experiment.train.cpus_per_worker, world.device)
        self.watchdog = Watchdog(run_folder, world.rank)
        self.plan = make_plan(experiment, cost.flops_per_image)
        self.dataset = open_training_data(experiment)
        diffusion = build_diffusion(experiment, self.dataset)
        self.meter = EnergyMeter(world.device)
        self.numerics, bit_identical = self._numerics()
        self.requested, experiment = experiment, fitted(experiment, self.dataset, world, run_folder)
        self.experiment = experiment
        self.learner = _build_learner(experiment, self.dataset, diffusion, world, self.numerics, self.plan.end)
        self.state = self._resume()
        self.state.bit_identical &= bit_identical
        attempt = world.from_first(uuid.uuid4().hex)
        self.saver = saving.Saver(
            run_folder, world.rank, world.size, attempt, ck.save_settings(experiment), self._rotate, self._flush_history
        )
        self.evaluations = RunEvaluations(
            experiment,
            run_folder,
            self.dataset,
            diffusion,
            world,
            self.numerics,
            self.state.values,
            submit,
            self._on_records,
            self._between_chunks,
        )
        self.metrics = self._metrics_log() if world.rank == 0 else None
        self._saved = LastSave(self.learner.images_seen, self.state.device_seconds)

    # ---- the loop

    def run(self) -> Outcome:
        """Run until the budget is used or a stop is requested; a checkpoint is complete when it returns.

        Raises StorageFailed and ShardError, possibly on one rank alone.
        """
        try:
            if self.world.rank == 0:
                self.stops.start()
            with self.loader():
                return self._train()
        except Stopped:  # within an evaluation, before which everything was saved
            return self._finish(REASONS[self.stops.reason or SIGNAL])
        except ShardError as error:
            if error.position is not None:
                ck.invalidate_checkpoints_from(self.run_folder, error.position)
            raise
        finally:
            self.watchdog.close()
            if self.metrics is not None:
                self.metrics.close()
            self.stops.close()

    def _train(self) -> Outcome:
        if self._evaluate_missing():
            return self._end("early")
        while not self._finished():
            before = self.state.device_seconds
            step = self.advance()
            if self.state.skipped_in_row >= self.experiment.train.nonfinite_limit:
                return self._end_nonfinite()
            if self.plan.evaluates(step.images_seen, before, step.clock, self._finished()):
                if self._save_and_evaluate():
                    return self._end("early")
            elif self.plan.checkpoints(step.images_seen, step.clock - self._saved.device_seconds):
                self._save(self._columns())
            if step.stop:
                return self._end(REASONS[step.stop])
        return self._end("finished")

    def _finished(self) -> bool:
        return self.plan.finished(self.learner.images_seen, self.state.device_seconds)

    def loader(self) -> Loader:
        """Loader for this rank's share of the global batch, starting at the current position."""
        train, data = self.experiment.train, self.experiment.data
        self._loader = create_loader(
            data.loader,
            self.dataset,
            seed=train.seed,
            global_batch=train.global_batch,
            start=self.learner.images_seen,
            shard=self.world.share(train.global_batch),
            device=self.world.device,
            flip=data.flip,
            augment=data.augment,
            order=data.order,
            channels_last=self.numerics.channels_last,
        )
        self._batches, self._mark = iter(self._loader), time.monotonic()
        return self._loader

    def advance(self) -> Step:
        """Make one step, including the wait for data, the clock, the history and progress."""
        waited = time.monotonic()
        batch = next(self._batches)
        stalled = time.monotonic() - waited
        extra = {} if batch.augment_label is None else {"augment_label": batch.augment_label}
        before = self.state.device_seconds
        try:
            step = self.learner.step(batch, extra=extra, clock=self._clock, stop=self.stops.reason)
        except torch.OutOfMemoryError:
            after_out_of_memory(self.requested, self.experiment, self.dataset, self.run_folder)
            raise
        self.watchdog.beat()
        self.state.count(step)
        if self.metrics is not None:
            seconds = (step.clock - before) / self.world.size
            images = self.experiment.train.global_batch
            self.metrics.step(step, images, seconds, stalled, step.clock, self.state.skipped)
        self.saver.check()
        return step

    def _clock(self) -> float:
        """Return rank 0's device-seconds now, without evaluation, waiting for the saver, and start-up."""
        before, self._mark = self._mark, time.monotonic()
        return self.state.device_seconds + (self._mark - before) * self.world.size

    # ---- saving

    def _save(self, columns: dict[str, Any]) -> None:
        """Start writing a checkpoint. columns: the record columns that training determines."""
        if not self._saved.made:
            with self.watchdog.slow():
                self._loader.wait_verified()  # the data must be undamaged before a checkpoint counts as good
        interval = self.metrics.interval if self.metrics is not None else None
        state = self.state.to_json(self._energy(), interval) | {
            "record": columns,
            "world_size": self.world.size,
            "data": {
                "resolution": self.dataset.resolution,
                "channels": self.dataset.channels,
                "num_classes": _num_classes(self.experiment, self.dataset),
            },
        }
        self.saver.save(saving.snapshot(self.learner, state, self.world.rank))
        self._saved = LastSave(self.learner.images_seen, self.state.device_seconds, made=True)

    def _columns(self) -> dict[str, Any]:
        return record_columns(
            self.experiment,
            self.dataset,
            self.cost,
            self.world,
            self.learner.images_seen,
            self.state.device_seconds,
            self._energy(),
            self.state.mean_loss(),
            self.numerics.precision,
            self.state.launches,
        )

    def _energy(self) -> float | None:
        """Return the joules of all devices since the run began, None if one is unknown. A collective call."""
        mine = self.meter.joules()
        values = torch.tensor([mine or 0.0, float(mine is None)], dtype=torch.float64, device=self.world.device)
        joules, unknown = self.world.sum(values).tolist()
        return None if unknown else self.state.energy_before + joules

    def _flush_history(self) -> None:
        if self.metrics is not None:
            self.metrics.history.flush()

    def _rotate(self, _: int) -> None:
        settings = self.experiment.train
        have = [ck.images_of(c) for c in ck.list_checkpoints(self.run_folder)]
        whole, weights = set(have[-settings.checkpoint.keep_last :]), self.evaluations.retain(have, self.plan.points)
        ck.rotate(self.run_folder, ck.RetentionPolicy(whole, weights, averages=bool(settings.ema.power)))

    # ---- evaluating

    def _evaluate_missing(self) -> bool:
        """Evaluate the points that earlier launches did not reach; return whether the run must end."""
        points = [i for i in self.plan.points if i <= self.learner.images_seen]
        with self._evaluating():
            self.evaluations.prepare()
            return self.evaluations.run_missing(points)

    def _save_and_evaluate(self) -> bool:
        """Save and evaluate the current weights; return whether the run must end."""
        columns = self._columns()
        self.state.loss_sum, self.state.loss_steps = 0.0, 0
        self._save(columns)
        with self._evaluating():
            return self.evaluations.evaluate(self.learner, columns)

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        """Exclude the enclosed block from training time and relax the watchdog."""
        if self.evaluations.evaluator is not None:
            self._phase("evaluating")
        with self.watchdog.slow():
            yield
        self._mark = time.monotonic()
        self._phase("training")

    def _between_chunks(self) -> bool:
        self.watchdog.touch()
        return bool(self.stops.reason)

    def _on_records(self, images: int, records: list[Record]) -> bool:
        if self.metrics is not None:
            self.metrics.evaluated(images, records)
        return self.should_stop is not None and True in [self.should_stop(record) for record in records]

    # ---- ending

    def _end(self, reason: Reason) -> Outcome:
        if self._saved.images_seen != self.learner.images_seen or not self._saved.made:
            self._save(self._columns())
        return self._finish(reason)

    def _finish(self, reason: Reason) -> Outcome:
        self._phase("saving")
        self.saver.wait()
        self.world.barrier()
        return self._outcome(reason)

    def _end_nonfinite(self) -> Outcome:
        count, end = self.state.skipped_in_row, self.learner.images_seen
        batch = self.experiment.train.global_batch
        first = end - count * batch
        self.saver.wait()
        if self.world.rank == 0:
            text = json.dumps({"first": first, "last": end, "global_batch": batch})
            storage.write_bytes(storage.join(self.run_folder, "nonfinite.json"), text.encode())
        message = f"{count} steps in a row had a loss or gradient that is not finite: positions {first} to {end - 1}"
        return self._outcome("nonfinite", message)

    def _outcome(self, reason: Reason, message: str = "") -> Outcome:
        return Outcome(reason, message, self.learner.images_seen, self.state.device_seconds, self._saved.images_seen)

    # ---- building

    def _numerics(self) -> tuple[Numerics, bool]:
        """Return the run's stored choices, else those of the settings, which rank 0 stores before the first step."""
        settled = None
        if self.world.rank == 0:
            settled = settle_numerics(self.experiment, self.run_folder, self.dataset, self.world)
        return self.world.from_first(settled)

    def _resume(self) -> TrainState:
        """Load the newest good checkpoint, if there is one."""
        found = None
        if self.world.rank == 0:
            found = ck.newest_good(self.run_folder)
            # damaged checkpoints after it will be written again
            ck.invalidate_checkpoints_from(self.run_folder, ck.images_of(found) if found else -1)
        checkpoint = self.world.from_first(found)
        if checkpoint is None:
            train = self.experiment.train
            if train.init_from is not None:
                start_from(self.learner, train.init_from, train.init_skip)
            return TrainState()
        stored = saving.restore(self.learner, checkpoint)
        state = TrainState.resumed(stored)
        state.bit_identical &= stored["world_size"] == self.world.size
        log.info("resumed from %s", checkpoint)
        return state

    def _metrics_log(self) -> MetricsLog:
        e, images = self.experiment, self.learner.images_seen
        run_id = e.run_id(self.dataset.content_hash)
        return MetricsLog(
            History(self.run_folder, images),
            make_trackers(e.train.trackers, self.run_folder, e.name, run_id, e.dotted(), images),
            self.messages,
            self.world,
            self.numerics.precision,
            self.cost.flops_per_image,
            e.train.price_per_device_hour,
            self.plan.log_images,
            self.plan.end,
            Interval(**self.state.interval),
        )

    def _phase(self, name: str) -> None:
        if self.world.rank == 0 and self.messages is not None:
            self.messages.put(PHASE, {"phase": name})


def _build_learner(
    experiment: Experiment, dataset: Dataset, diffusion: Diffusion, world: World, numerics: Numerics, end: int | None
) -> Learner:
    """Build the learner at the run's beginning: the same weights on every rank, from the run's seed."""
    torch.manual_seed(experiment.train.seed)
    model = build_model(experiment, dataset).to(world.device)
    if experiment.train.activation_checkpointing:
        model.set_activation_checkpointing(True)  # type: ignore[operator]
    sharded = experiment.train.parallel == "fsdp2" and world.size > 1
    numerics.prepare(model, to_shard=sharded)
    if sharded:
        model = shard(model, world, numerics.precision)
    return Learner(model, diffusion, experiment, world, numerics, _num_classes(experiment, dataset), end)


def _num_classes(experiment: Experiment, dataset: Dataset) -> int:
    return experiment.num_classes(dataset)
