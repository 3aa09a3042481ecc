"""One launch of a run on one rank: resumes from the newest good checkpoint, trains, evaluates, saves.

Nothing but the run's folder persists between two launches. Every decision (evaluate, save, stop) follows from numbers
that all ranks share, so all ranks make the same calls in the same order.
"""

from __future__ import annotations

import json
import logging
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch

from diffscale.config.experiment import Experiment
from diffscale.config.factory import build_diffusion, build_model
from diffscale.core import storage
from diffscale.core.device import EnergyMeter
from diffscale.core.progress import shown_by
from diffscale.data import Dataset, Loader, ShardError, create_loader, share_of_batch
from diffscale.diffusion import Diffusion
from diffscale.distributed.messages import PHASE
from diffscale.evaluation.distribute import Stopped
from diffscale.kernels.runtime import configure_process
from diffscale.models.cost import Cost
from diffscale.records.schema import Record
from diffscale.training.checkpoint import layout as ck
from diffscale.training.checkpoint import saver as saving
from diffscale.training.checkpoint.restore import restore_newest
from diffscale.training.compile_turn import CompileTurn
from diffscale.training.control import REASONS, SIGNAL, StopRequests, Watchdog
from diffscale.training.fit import after_out_of_memory, fitted
from diffscale.training.initial_weights import start_from
from diffscale.training.learner import Learner
from diffscale.training.metrics_log import History, Interval, Listener, MetricsLog
from diffscale.training.numerics import Numerics, settle_numerics, usable
from diffscale.training.parallel import World, shard
from diffscale.training.plan import make_plan
from diffscale.training.profile import StepProfile
from diffscale.training.progress import PhaseDisplay
from diffscale.training.record_columns import record_columns
from diffscale.training.run_evaluations import RunEvaluations
from diffscale.training.shared_dataset import open_for_ranks
from diffscale.training.spec import Outcome, Reason
from diffscale.training.step import Launched
from diffscale.training.trackers import TrackedRun, make_trackers
from diffscale.training.train_state import LastSave, TrainState

log = logging.getLogger(__name__)

ShouldStop = Callable[[Record], bool]

# Steps whose results the host has not read yet. A GPU works on one while the host prepares the next; on a CPU a step
# has ended when it was launched. The number is fixed, so that all ranks decide after the same step.
STEPS_AHEAD = {"cuda": 1}


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
        steps_ahead: int | None = None,
        content_hash: str | None = None,
    ) -> None:
        """Build the run and resume it from its newest good checkpoint.

        cost: of one training image
        messages: receives phases, progress and evaluations on rank 0
        should_stop: called on rank 0 with each new record; True ends the run early, at a checkpoint
        stop_requested: returns on rank 0 whether the run must stop at a checkpoint
        submit: has a separate task evaluate the checkpoint at a number of images; see RunEvaluations
        steps_ahead: steps that the device may be behind the host; None for STEPS_AHEAD
        content_hash: of the dataset with which the command started; another one is refused
        """
        self.experiment, self.run_folder, self.world, self.cost = experiment, run_folder, world, cost
        self.messages, self.should_stop = messages, should_stop
        self.stops = StopRequests(stop_requested, experiment.train.wall_seconds)
        self._phase("loading")
        configure_process(experiment.train.cpus_per_worker, world.device)
        self.watchdog = Watchdog(run_folder, world.rank)
        self.plan = make_plan(experiment, cost.flops_per_image)
        self.dataset = open_for_ranks(experiment, world, content_hash)
        if world.rank == 0:
            _propose_lanes(experiment, self.dataset, world)
        diffusion = build_diffusion(experiment, self.dataset)
        self.meter = EnergyMeter(world.device)
        self.numerics, bit_identical = self._numerics()
        if self.numerics.compile:
            self.watchdog.allow_compilation()
        self.requested, experiment = experiment, fitted(experiment, self.dataset, world, run_folder)
        self.experiment = experiment
        attempt = world.from_first(uuid.uuid4().hex)
        turn = CompileTurn(world, attempt) if self.numerics.compile else None
        self.learner = _build_learner(experiment, self.dataset, diffusion, world, self.numerics, self.plan.end, turn)
        self.state = self._resume()
        self.state.bit_identical &= bit_identical
        self.saver = saving.Saver(
            run_folder,
            world.rank,
            self.learner.holders,
            attempt,
            ck.save_settings(experiment),
            self._rotate,
            self._flush_history,
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
            self._on_picture,
            self._between_chunks,
        )
        self.metrics = self._metrics_log() if world.rank == 0 else None
        self._saved = LastSave(self.learner.images_seen, self.state.device_seconds)
        self._ahead = STEPS_AHEAD.get(world.device.type, 0) if steps_ahead is None else steps_ahead
        self._launched: deque[tuple[Launched, float]] = deque()  # with the seconds that each waited for data
        self._stop = 0  # rank 0's request, as of the last result
        self._profile: StepProfile | None = None
        self._device_seconds = self.state.device_seconds  # as of the last clock, which can be ahead of the last result

    # ---- the loop

    def run(self) -> Outcome:
        """Run until the budget is used or a stop is requested; a checkpoint is complete when it returns.

        Raises StorageFailed and ShardError, possibly on one rank alone.
        """
        try:
            if self.world.rank == 0:
                self.stops.start()
            with self.loader(), self._profiled():
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
            self.advance()
            if not self._due(before):
                continue
            self._read_all()
            if self.state.skipped_in_row >= self.experiment.train.nonfinite_limit:
                return self._end_nonfinite("had a loss or gradient that is not finite")
            if not self._weights_are_finite():
                return self._end_nonfinite("left weights that are not finite")
            if self._evaluates(before):
                if self._save_and_evaluate():
                    return self._end("early")
            elif self._checkpoints():
                self._save(self._columns())
            if self._stop:
                return self._end(REASONS[self._stop])
        return self._end("finished")

    def _due(self, before: float) -> bool:
        """Return whether there is anything to do besides the next step, as far as results were read."""
        nonfinite = self.state.skipped_in_row >= self.experiment.train.nonfinite_limit
        return nonfinite or bool(self._stop) or self._finished() or self._evaluates(before) or self._checkpoints()

    def _evaluates(self, before: float) -> bool:
        seconds = self.state.device_seconds
        return self.plan.evaluates(self.learner.images_seen, before, seconds, self._finished())

    def _checkpoints(self) -> bool:
        return self.plan.checkpoints(self.learner.images_seen, self.state.device_seconds - self._saved.device_seconds)

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
            shard=share_of_batch(data.order, train.global_batch, self.world.rank, self.world.size, data.lanes),
            device=self.world.device,
            flip=data.flip,
            augment=data.augment,
            order=data.order,
            lanes=data.lanes,
            node_workers=self.world.node_size,
            channels_last=self.numerics.channels_last,
            numbers=self.learner.draw_numbers,
        )
        self._batches, self._mark = iter(self._loader), time.monotonic()
        return self._loader

    def advance(self) -> None:
        """Launch one step, and read the result of the one that is due: clock, history, progress."""
        waited = time.monotonic()
        batch = next(self._batches)
        stalled = time.monotonic() - waited
        extra = {} if batch.augment_label is None else {"augment_label": batch.augment_label}
        try:
            launched = self.learner.launch(
                batch, extra=extra, numbers=batch.numbers, clock=self._clock, stop=self.stops.reason
            )
        except torch.OutOfMemoryError:
            after_out_of_memory(self.requested, self.experiment, self.dataset, self.world, self.run_folder)
            raise
        self._launched.append((launched, stalled))
        if len(self._launched) > self._ahead:
            self._read()
        self.saver.check()
        if self._profile is not None:
            self._profile.step()

    def _profiled(self) -> AbstractContextManager[Any]:
        """Context in which rank 0's steps are profiled, if train.profile asks for it."""
        if self.experiment.train.profile and self.world.rank == 0:
            self._profile = StepProfile(self.run_folder, self.world.device)
        return self._profile or nullcontext()

    def _read(self) -> None:
        """Wait for the oldest step that was launched and count its result."""
        launched, stalled = self._launched.popleft()
        before, step = self.state.device_seconds, launched.read()
        self.watchdog.beat()
        self.state.count(step)
        self._stop = step.stop
        if self.metrics is not None:
            seconds = (step.clock - before) / self.world.size
            images = self.experiment.train.global_batch
            self.metrics.step(step, images, seconds, stalled, step.clock, self.state.skipped)

    def _read_all(self) -> None:
        """Wait for every step that was launched, and count the time of the last ones. A collective call."""
        if not self._launched:
            return
        while self._launched:
            self._read()
        before, self.state.device_seconds = self.state.device_seconds, self.world.from_first(self._clock())
        if self.metrics is not None:
            self.metrics.interval.seconds += (self.state.device_seconds - before) / self.world.size

    def _clock(self) -> float:
        """Return rank 0's device-seconds now, without evaluation, waiting for the saver, and start-up."""
        now = time.monotonic()
        self._device_seconds += (now - self._mark) * self.world.size
        self._mark = now
        return self._device_seconds

    # ---- saving

    def _save(self, columns: dict[str, Any]) -> None:
        """Start writing a checkpoint. columns: the record columns that training determines."""
        with self.watchdog.slow():  # what was used must be undamaged before a checkpoint counts as good
            self._loader.wait_verified(everything=False)
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
        self.saver.wait()  # the buffer holds one snapshot
        self.saver.save(saving.snapshot(self.learner, state, self.world.rank, self.saver.buffer))
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
        sent = shown_by(PhaseDisplay(self.messages, "evaluating")) if self.messages is not None else nullcontext()
        with self.watchdog.slow(), sent if self.world.rank == 0 else nullcontext():
            yield
        self._mark = time.monotonic()
        self._phase("training")

    def _between_chunks(self) -> bool:
        self.watchdog.touch()
        return bool(self.stops.reason)

    def _on_picture(self, images: int, uri: str) -> None:
        if self.metrics is not None:
            self.metrics.picture(images, uri)

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

    def _weights_are_finite(self) -> bool:
        """Return whether all weights and averages are finite: no checkpoint may hold others. A collective call."""
        tensors = [*self.learner.ema.parameters.values()]
        tensors += [tensor for average in self.learner.ema.averages.values() for tensor in average.values()]
        lost = torch.stack([~torch.isfinite(tensor.detach()).all() for tensor in tensors if tensor.numel()]).any()
        return not bool(self.world.sum(lost.double()))

    def _end_nonfinite(self, problem: str) -> Outcome:
        """End the run at its last checkpoint. problem: what was wrong with the last steps."""
        count, end = max(self.state.skipped_in_row, 1), self.learner.images_seen
        batch = self.experiment.train.global_batch
        first = end - count * batch
        self.saver.wait()
        if self.world.rank == 0:
            text = json.dumps({"first": first, "last": end, "global_batch": batch})
            storage.write_bytes(storage.join(self.run_folder, "nonfinite.json"), text.encode())
        steps = f"{count} steps in a row" if count > 1 else "a step"
        message = f"{steps} {problem}: positions {first} to {end - 1}"
        return self._outcome("nonfinite", message)

    def _outcome(self, reason: Reason, message: str = "") -> Outcome:
        return Outcome(reason, message, self.learner.images_seen, self.state.device_seconds, self._saved.images_seen)

    # ---- building

    def _numerics(self) -> tuple[Numerics, bool]:
        """Return the run's stored choices, else those of the settings, which rank 0 stores before the first step.

        Also whether results are bit-identical to those of an uninterrupted run under these choices.
        """
        settled = None
        if self.world.rank == 0:
            settled = settle_numerics(self.experiment, self.run_folder, self.dataset, self.world)
        chosen, bit_identical = self.world.from_first(settled)
        numerics = usable(chosen, self.world)
        return numerics, bit_identical and numerics == chosen

    def _resume(self) -> TrainState:
        """Load the newest good checkpoint, if there is one."""
        found = restore_newest(self.learner, self.run_folder, self.world)
        if found is None:
            train = self.experiment.train
            if train.init_from is not None:
                start_from(self.learner, train.init_from, train.init_skip)
            return TrainState()
        checkpoint, stored = found
        state = TrainState.resumed(stored)
        state.bit_identical &= stored["world_size"] == self.world.size
        log.info("resumed from %s", checkpoint)
        return state

    def _metrics_log(self) -> MetricsLog:
        e, images = self.experiment, self.learner.images_seen
        run_id = e.run_id(self.dataset.content_hash)
        return MetricsLog(
            History(self.run_folder, images),
            make_trackers(TrackedRun(e, self.run_folder, run_id, images)),
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
    experiment: Experiment,
    dataset: Dataset,
    diffusion: Diffusion,
    world: World,
    numerics: Numerics,
    end: int | None,
    turn: CompileTurn | None,
) -> Learner:
    """Build the learner at the run's beginning: the same weights on every rank, from the run's seed."""
    torch.manual_seed(experiment.train.seed)
    model = build_model(experiment, dataset).to(world.device)
    if experiment.train.activation_checkpointing:
        model.set_activation_checkpointing(True)  # type: ignore[operator]
    sharded = experiment.train.sharded and world.size > 1
    numerics.prepare(model, to_shard=sharded)
    if sharded:
        within_nodes = experiment.train.parallel == "hsdp"
        shard(model, world, numerics.precision, within_nodes=within_nodes, reduced_in=numerics.reduced_in)
    return Learner(model, diffusion, experiment, world, numerics, _num_classes(experiment, dataset), end, turn=turn)


def _propose_lanes(experiment: Experiment, dataset: Dataset, world: World) -> None:
    """Log that every node will fetch all of a remote dataset, where another order would spare it.

    The order is not chosen here: it is part of the run's identity.
    """
    if dataset.cache is not None and world.node_size < world.size and experiment.data.order != "lanes":
        log.warning(
            "with data.order=%s every node fetches all of %s; with data.order=lanes a node fetches its share",
            experiment.data.order,
            dataset.path,
        )


def _num_classes(experiment: Experiment, dataset: Dataset) -> int:
    return experiment.num_classes(dataset)
