"""One launch of a run on one rank: takes it up where its newest good checkpoint left it, trains, evaluates, saves.

Nothing here is kept between two launches but the run's folder. All decisions (evaluate, save, stop) are made from
numbers that every rank has alike, so that all ranks make the same calls in the same order.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from diffscale.config.experiment import Experiment
from diffscale.config.factory import build_diffusion, build_model, open_training_data
from diffscale.core import storage
from diffscale.core.device import EnergyMeter
from diffscale.data import Loader, ShardError, create_loader
from diffscale.evaluation.distribute import Stopped
from diffscale.records.store import Record
from diffscale.training.checkpoint import layout as ck
from diffscale.training.checkpoint import saver as saving
from diffscale.training.columns import run_columns
from diffscale.training.evaluations import Evaluations
from diffscale.training.health import Watchdog
from diffscale.training.history import History, make_trackers
from diffscale.training.learner import Learner, Step
from diffscale.training.monitor import PHASE, Interval, Listener, Monitor
from diffscale.training.numerics import Numerics
from diffscale.training.parallel import World, shard
from diffscale.training.plan import make_plan
from diffscale.training.setting_up import Cost, settle_numerics, settle_process
from diffscale.training.stops import SIGNAL, STOPPED, Stops

log = logging.getLogger(__name__)

ShouldStop = Callable[[Record], bool]


class Session:
    """One launch of the workers of one run. `run` returns the outcome, plain JSON, on every rank."""

    def __init__(
        self,
        experiment: Experiment,
        run_folder: str,
        world: World,
        cost: Cost,
        listener: Listener | None = None,
        should_stop: ShouldStop | None = None,
        asked: Callable[[], bool] = lambda: False,
        hand_over: Callable[[int], None] | None = None,
    ) -> None:
        """asked: whether the run is to stop at a checkpoint. hand_over: see Evaluations."""
        self.experiment, self.run_folder, self.world, self.cost = experiment, run_folder, world, cost
        self.listener, self.should_stop = listener, should_stop
        self.stops = Stops(asked, experiment.train.wall_seconds)
        self.phase("loading")
        settle_process(experiment.train.cpus_per_worker, world.device)
        self.watchdog = Watchdog(run_folder, world.rank)
        self.plan = make_plan(experiment, cost.flops_per_image)
        self.dataset = open_training_data(experiment)
        self.diffusion = build_diffusion(experiment, self.dataset)
        self.meter = EnergyMeter(world.device)
        self.device_seconds, self.energy_before, self.skipped, self.in_row = 0.0, 0.0, 0, 0
        self.loss_sum, self.loss_steps, self.bit_identical = 0.0, 0, True
        self.launches = 1
        self._interval: dict[str, Any] = {}  # of the history's unfinished row, as the checkpoint has it
        self.learner = self._learner()
        values = self._resume()
        self.saver = saving.Saver(
            run_folder,
            world.rank,
            world.size,
            world.from_first(uuid.uuid4().hex),
            ck.save_settings(experiment),
            self._rotate,
            self._flush_history,
        )
        self.evaluations = Evaluations(
            experiment,
            run_folder,
            self.dataset,
            self.diffusion,
            world,
            self.numerics,
            values,
            hand_over,
            self._told,
            self._between_chunks,
        )
        self.monitor = self._monitor() if world.rank == 0 else None
        self._saved_at, self._saved_clock, self._saved_any = self.learner.images_seen, self.device_seconds, False

    # ---- making

    def _learner(self) -> Learner:
        """The learner at the run's beginning: the same weights on every rank, from the run's seed."""
        e, world = self.experiment, self.world
        torch.manual_seed(e.train.seed)
        model = build_model(e, self.dataset).to(world.device)
        if e.train.activation_checkpointing:
            model.set_activation_checkpointing(True)  # type: ignore[operator]
        self.numerics = self._settled()
        if e.train.parallel == "fsdp2" and world.size > 1:
            model = shard(model, world, self.numerics.precision)
        self.numerics.prepare(model)
        classes = self.dataset.num_classes if e.data.class_conditional else 0
        return Learner(model, self.diffusion, e, world, self.numerics, classes, self.plan.end)

    def _settled(self) -> Numerics:
        """The run's stored choices, else those of the settings, stored by rank 0 before the first step."""
        stored = None
        if self.world.rank == 0:
            stored = settle_numerics(self.experiment, self.run_folder, self.dataset, self.world)
        stored = self.world.from_first(stored)
        self.bit_identical = bool(stored["bit_identical"])
        return Numerics(**stored["numerics"])

    def _resume(self) -> dict[int, float]:
        """Takes the newest good checkpoint up; gives the values of its evaluations."""
        found = None
        if self.world.rank == 0:
            found = ck.newest_good(self.run_folder)
            ck.distrust(self.run_folder, ck.images_of(found) if found else -1)  # damaged ones will be written again
        checkpoint = self.world.from_first(found)
        if checkpoint is None:
            return {}
        state = saving.load(self.learner, checkpoint)
        self.device_seconds, self.energy_before = state["device_seconds"], state["energy_joules"] or 0.0
        self.skipped, self.in_row = state["skipped"], state["skipped_in_row"]
        self.loss_sum, self.loss_steps = state["loss_sum"], state["loss_steps"]
        self._interval, self.launches = state.get("interval") or {}, state.get("launches", 1) + 1
        self.bit_identical &= state["bit_identical"] and state["world_size"] == self.world.size
        log.info("resumed from %s", checkpoint)
        return {int(images): value for images, value in state["values"].items()}

    def _monitor(self) -> Monitor:
        e, images = self.experiment, self.learner.images_seen
        run_id = e.run_id(self.dataset.content_hash)
        return Monitor(
            History(self.run_folder, images),
            make_trackers(e.train.trackers, self.run_folder, e.name, run_id, e.dotted(), images),
            self.listener,
            self.world,
            self.numerics.precision,
            self.cost.flops_per_image,
            e.train.price_per_device_hour,
            self.plan.log_images,
            self.plan.end,
            Interval(**self._interval),
        )

    # ---- the loop

    def run(self) -> dict[str, Any]:
        """Until the budget is used, or something asks to stop; a checkpoint is complete then.

        Raises StorageFailed and ShardError, maybe on one rank alone.
        """
        try:
            return self._run()
        except ShardError as error:
            if error.position is not None:
                ck.distrust(self.run_folder, error.position)
            raise
        finally:
            self.watchdog.close()
            if self.monitor is not None:
                self.monitor.close()
            self.stops.close()

    def _run(self) -> dict[str, Any]:
        if self.world.rank == 0:
            self.stops.start()
        with self.loader():
            try:
                return self._train()
            except Stopped:  # in an evaluation, before which everything was saved
                return self._finish(STOPPED[self.stops.wish or SIGNAL])

    def _train(self) -> dict[str, Any]:
        plan = self.plan
        points = [i for i in plan.points if i <= self.learner.images_seen]
        with self._evaluating():
            self.evaluations.prepare()
            stop = self.evaluations.make_up(points)
        if stop:
            return self._end("early")
        while not plan.finished(self.learner.images_seen, self.device_seconds):
            before = self.device_seconds
            step = self.advance()
            if self.in_row >= self.experiment.train.nonfinite_limit:
                return self._nonfinite()
            images = self.learner.images_seen
            due = plan.evaluates(images, before, self.device_seconds, plan.finished(images, self.device_seconds))
            if due:
                columns = self._columns()
                self.loss_sum, self.loss_steps = 0.0, 0
                self._save(columns)
                with self._evaluating():
                    stop = self.evaluations.evaluate(self.learner, columns)
                if stop:
                    return self._end("early")
            elif plan.checkpoints(images, self.device_seconds - self._saved_clock):
                self._save(self._columns())
            if step.stop:
                return self._end(STOPPED[step.stop])
        return self._end("finished")

    def loader(self) -> Loader:
        """Of this rank's share, from where the run is."""
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
        )
        self._batches, self._mark = iter(self._loader), time.monotonic()
        return self._loader

    def advance(self) -> Step:
        """One step with all that belongs to it: waiting for data, the clock, history and progress."""
        waited = time.monotonic()
        batch = next(self._batches)
        stalled = time.monotonic() - waited
        extra = {} if batch.augment_label is None else {"augment_label": batch.augment_label}
        step = self.learner.step(batch, extra=extra, clock=self._clock, stop=self.stops.wish)
        self.watchdog.beat()
        self._count(step, stalled)
        self.saver.check()
        return step

    def _clock(self) -> float:
        """Rank 0's device-seconds now; evaluation, saving's wait and start-up are left out of it."""
        before, self._mark = self._mark, time.monotonic()
        return self.device_seconds + (self._mark - before) * self.world.size

    def _count(self, step: Step, stalled: float) -> None:
        seconds = (step.clock - self.device_seconds) / self.world.size
        self.device_seconds = step.clock
        self.skipped += step.skipped
        self.in_row = self.in_row + 1 if step.skipped else 0
        if not (step.skipped or step.overflow):
            self.loss_sum, self.loss_steps = self.loss_sum + step.loss, self.loss_steps + 1
        if self.monitor is not None:
            batch = self.experiment.train.global_batch
            self.monitor.step(step, batch, seconds, stalled, self.device_seconds, self.skipped)

    # ---- saving and evaluating

    def _state(self, columns: dict[str, Any]) -> dict[str, Any]:
        data = self.dataset
        classes = data.num_classes if self.experiment.data.class_conditional else 0
        return {
            "device_seconds": self.device_seconds, "energy_joules": self._energy(), "skipped": self.skipped,
            "launches": self.launches, "skipped_in_row": self.in_row,
            "loss_sum": self.loss_sum, "loss_steps": self.loss_steps,
            "interval": dataclasses.asdict(self.monitor.interval) if self.monitor is not None else None,
            "values": {str(images): value for images, value in self.evaluations.values.items()}, "record": columns,
            "world_size": self.world.size, "bit_identical": self.bit_identical,
            "data": {"resolution": data.resolution, "channels": data.channels, "num_classes": classes},
        }  # fmt: skip

    def _columns(self) -> dict[str, Any]:
        return run_columns(
            self.experiment,
            self.dataset,
            self.cost,
            self.world,
            self.learner.images_seen,
            self.device_seconds,
            self._energy(),
            self.loss_sum / self.loss_steps if self.loss_steps else None,
            self.numerics.precision,
            self.launches,
        )

    def _energy(self) -> float | None:
        """Joules of all devices since the run began, None where one cannot tell. Every rank calls it."""
        mine = self.meter.joules()
        values = torch.tensor([mine or 0.0, float(mine is None)], dtype=torch.float64, device=self.world.device)
        joules, unknown = self.world.sum(values).tolist()
        return None if unknown else self.energy_before + joules

    def _save(self, columns: dict[str, Any]) -> None:
        if not self._saved_any:
            with self.watchdog.slow():
                self._loader.wait_verified()  # before a checkpoint counts as good (DECISIONS 16)
        self.saver.save(saving.take(self.learner, self._state(columns), self.world.rank))
        self._saved_any, self._saved_at = True, self.learner.images_seen
        self._saved_clock = self.device_seconds

    def _flush_history(self) -> None:
        if self.monitor is not None:
            self.monitor.history.flush()

    def _rotate(self, _: int) -> None:
        settings = self.experiment.train
        have = [ck.images_of(c) for c in ck.list_checkpoints(self.run_folder)]
        whole, weights = set(have[-settings.checkpoint.keep_last :]), self.evaluations.keep(have, self.plan.points)
        ck.rotate(self.run_folder, ck.Keep(whole, weights, averages=bool(settings.ema.power)))

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        """What is done inside is no training, and may take long."""
        if self.evaluations.judge is not None:
            self.phase("evaluating")
        with self.watchdog.slow():
            yield
        self._mark = time.monotonic()
        self.phase("training")

    def _between_chunks(self) -> bool:
        self.watchdog.go_on()
        return bool(self.stops.wish)

    def _told(self, images: int, records: list[Record]) -> bool:
        if self.monitor is not None:
            self.monitor.evaluated(images, records)
        return self.should_stop is not None and True in [self.should_stop(record) for record in records]

    # ---- ending

    def _end(self, reason: str) -> dict[str, Any]:
        if self._saved_at != self.learner.images_seen or not self._saved_any:
            self._save(self._columns())
        return self._finish(reason)

    def _finish(self, reason: str) -> dict[str, Any]:
        self.phase("saving")
        self.saver.wait()
        self.world.barrier()
        return self._outcome(reason)

    def _nonfinite(self) -> dict[str, Any]:
        batch = self.experiment.train.global_batch
        first = self.learner.images_seen - self.in_row * batch
        self.saver.wait()
        text = json.dumps({"first": first, "last": self.learner.images_seen, "global_batch": batch})
        if self.world.rank == 0:
            storage.write_bytes(storage.join(self.run_folder, "nonfinite.json"), text.encode())
        message = (
            f"{self.in_row} steps in a row had a loss or gradient that is not finite: "
            f"positions {first} to {self.learner.images_seen - 1}"
        )
        return self._outcome("nonfinite", message=message)

    def _outcome(self, reason: str, message: str = "") -> dict[str, Any]:
        return {
            "reason": reason, "message": message, "images_seen": self.learner.images_seen,
            "device_seconds": self.device_seconds, "checkpoint_images": self._saved_at,
        }  # fmt: skip

    def phase(self, name: str) -> None:
        if self.world.rank == 0 and self.listener is not None:
            self.listener.put(PHASE, {"phase": name})
