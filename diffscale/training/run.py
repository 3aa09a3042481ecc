"""One run, from the command's side: checks the settings, starts the workers through Ray Train, waits for the outcome.

`train` is the function behind `python -m diffscale.train`. A trial of a sweep calls it too.
"""

from __future__ import annotations

import json
import os
import signal
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from rich.console import Console

from diffscale.config.experiment import Experiment
from diffscale.core import storage
from diffscale.core.errors import UserError
from diffscale.core.provenance import job_environment, source, versions
from diffscale.core.text import one_line
from diffscale.preflight.shared_storage import require_shared
from diffscale.records.schema import Record
from diffscale.training.spec import Outcome, Reason, RunSpec

if TYPE_CHECKING:
    from diffscale.data import Dataset
    from diffscale.models.cost import Cost

EXIT_STOPPED, EXIT_RESUMABLE, EXIT_INTERRUPTED = 3, 143, 130
ShouldStop = Callable[[Record], bool]


@dataclass(frozen=True)
class RunResult:
    """Where a run was left and why it stopped."""

    run_folder: str
    run_id: str
    images_seen: int
    reason: Reason
    message: str = ""
    signals: tuple[int, ...] = ()  # signals that this command received

    @property
    def finished(self) -> bool:
        """Whether the budget is used and every evaluation is there."""
        return self.reason == "finished"

    @property
    def stopped(self) -> bool:
        """Whether the run was told to stop, at a checkpoint, before its budget was used."""
        return self.reason == "early" or self.resumable

    @property
    def resumable(self) -> bool:
        """Whether the same command resumes the run: it was stopped by a signal or the wall-clock limit."""
        return self.reason in ("signal", "wall")


def train(
    experiment: Experiment,
    *,
    should_stop: ShouldStop | None = None,
    show: bool = True,
    handle_signals: bool = False,
    stop_with: str | None = None,
    here: bool = False,
) -> RunResult:
    """Train to the budget and evaluate at its points, resuming what is in the run's folder.

    Raises UserError for settings that cannot work, before training starts where that can be known.

    should_stop: called on rank 0 with each new record (it is pickled to the worker); True ends the run early, at a
        checkpoint
    show: whether to print progress
    handle_signals: SIGTERM and SIGINT end the run at a checkpoint (main thread only)
    stop_with: launch of other Messages (distributed/messages.py) whose STOP ends the run at a checkpoint
    here: train in this process, the one worker, without Ray Train; it raises what the training raises
    """
    from diffscale.training.guide import with_guide  # import cost
    from diffscale.training.initial_weights import with_initial_weights  # import cost
    from diffscale.training.numerics import settled, uses_gpu  # import cost
    from diffscale.training.run_readme import write_readme  # import cost
    from diffscale.training.settings_check import check_settings  # import cost

    dataset = check_settings(experiment)
    cost = _count_while_ray_starts(experiment, dataset)
    experiment = with_guide(with_initial_weights(settled(experiment, dataset), dataset))
    run_id, folder = experiment.run_id(dataset.content_hash), experiment.run_folder(dataset.content_hash)
    finished_at = _finished_at(experiment, folder, cost)
    if finished_at is not None:
        if show:
            Console().print(f"{experiment.name}: already finished", highlight=False)
        return RunResult(folder, run_id, finished_at, "finished")
    _write_settings(folder, experiment, dataset)
    require_shared(experiment.storage)
    from diffscale.training.async_evaluation import wanted  # import cost

    gpu = uses_gpu(experiment)
    evaluate_async = wanted(experiment, gpu, should_stop is not None or stop_with is not None)
    launch, content = uuid.uuid4().hex, dataset.content_hash
    spec = RunSpec(experiment, folder, cost, launch, gpu, stop_with, evaluate_async, content)
    outcome, signals = _launch(spec, should_stop, show, handle_signals, here)
    if outcome.reason == "finished" and evaluate_async:
        outcome = _check_evaluations(outcome, spec, bool(signals))
    if outcome.reason == "finished":
        write_readme(folder, experiment)
    if outcome.reason == "refused" and outcome.error is not None:
        raise UserError(**outcome.error)
    message = outcome.message if outcome.error is None else UserError(**outcome.error).text()
    return RunResult(folder, run_id, outcome.images_seen, outcome.reason, message, tuple(signals))


def prepare(experiment: Experiment) -> tuple[Dataset, Cost]:
    """Return the dataset and the cost of one image. Raises UserError for settings that cannot train."""
    from diffscale.training.settings_check import check_settings  # import cost

    dataset = check_settings(experiment)
    return dataset, count(experiment, dataset)


def count(experiment: Experiment, dataset: Dataset) -> Cost:
    """Return the cost of one training image."""
    from diffscale.config.factory import build_model  # import cost
    from diffscale.models.cost import count_cost  # import cost

    classes = experiment.num_classes(dataset)
    return count_cost(lambda: build_model(experiment, dataset), dataset.resolution, dataset.channels, classes)


def _count_while_ray_starts(experiment: Experiment, dataset: Dataset) -> Cost:
    """Call `count` in a thread while this one starts Ray, whose processes end with the thread that started them."""
    from diffscale.distributed.connect import connect  # import cost

    with ThreadPoolExecutor(1, thread_name_prefix="count") as pool:
        counted = pool.submit(count, experiment, dataset)
        connect(num_cpus=_cpus_needed(experiment))
        return counted.result()


def _cpus_needed(experiment: Experiment) -> int:
    """Return the CPUs of a private cluster; workers share them if the machine has fewer."""
    workers = experiment.train.min_workers
    if experiment.eval.workers == "own" and experiment.eval.n_generated:
        workers += experiment.eval.devices or 1
    return max(workers * experiment.train.cpus_per_worker, os.cpu_count() or 1)


# ---- what is in the run's folder


def _finished_at(experiment: Experiment, folder: str, cost: Cost) -> int | None:
    """Return the images seen of a run whose newest checkpoint used the budget and that lacks no evaluation."""
    from diffscale.training.checkpoint.layout import list_checkpoints, read_state  # import cost
    from diffscale.training.checkpoint.tensors import CheckpointDamaged  # import cost
    from diffscale.training.own_records import missing_points  # import cost
    from diffscale.training.plan import make_plan  # import cost

    plan = make_plan(experiment, cost.flops_per_image)
    for checkpoint in reversed(list_checkpoints(folder)):
        try:
            state = read_state(checkpoint)
        except CheckpointDamaged:
            continue
        images = int(state["images_seen"])
        if not plan.finished(images, state["device_seconds"]):
            return None
        return None if missing_points(folder, experiment, plan.points, map(int, state["values"])) else images
    return None


def _check_evaluations(outcome: Outcome, spec: RunSpec, signalled: bool) -> Outcome:
    """Return the outcome of a run that trained to the end: "evaluation" if a separate task failed.

    signalled: whether a signal came, which no evaluation waits for
    """
    from diffscale.training.own_records import missing_points  # import cost
    from diffscale.training.plan import make_plan  # import cost

    points = make_plan(spec.experiment, spec.cost.flops_per_image).points
    missing = missing_points(spec.run_folder, spec.experiment, points)
    if not missing:
        return outcome
    if signalled:
        return replace(outcome, reason="signal")
    images = ", ".join(f"{i:,}" for i in missing)
    message = f"trained to the end, but the evaluations at {images} images failed"
    return replace(outcome, reason="evaluation", message=message)


def _write_settings(folder: str, experiment: Experiment, dataset: Dataset) -> None:
    """Write the settings of this launch, and add it to the provenance of all launches."""
    from diffscale.training.checkpoint.layout import save_settings  # import cost

    storage.write_bytes(storage.join(folder, "experiment.yaml"), save_settings(experiment))
    uri = storage.join(folder, "provenance.json")
    launches = json.loads(storage.read_bytes(uri))["launches"] if storage.exists(uri) else []
    commit, dirty = source()
    launches.append(
        {
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "commit": commit,
            "dirty": dirty,
            "versions": versions(),
            "dataset_hash": dataset.content_hash,
        }
    )
    storage.write_bytes(uri, json.dumps({"launches": launches}, indent=1).encode())


# ---- the workers


def _launch(
    spec: RunSpec, should_stop: ShouldStop | None, show: bool, handle_signals: bool, here: bool
) -> tuple[Outcome, list[int]]:
    """Run the workers to the end of the launch. Returns the outcome and the signals that arrived meanwhile."""
    from diffscale.distributed.messages import OUTCOME, STOP, Messages  # import cost
    from diffscale.training.progress import RunProgress  # import cost

    messages = Messages(spec.launch)
    stop = (lambda: messages.put(STOP, {})) if handle_signals else None
    config = {"spec": spec.to_json(), "should_stop": should_stop}
    signals: list[int] = []
    error = None

    def interrupted() -> bool:
        """Return whether the training was stopped, or is done and a signal came: the next launch evaluates the rest."""
        outcome = messages.get(OUTCOME)
        return outcome is not None and (outcome["reason"] in ("signal", "wall") or bool(signals))

    try:
        with RunProgress(messages, spec.experiment.name, show):
            if here:
                _train_here(spec, config)
            else:
                with on_signals(stop) as signals:
                    error = _wait_for(_trainer(spec, config).fit, interrupted)
        outcome = messages.get(OUTCOME)
    finally:
        messages.close()
    if outcome is None and error is not None:
        limit = spec.experiment.train.max_failures
        text = f"the workers were lost more often than train.max_failures = {limit}; the last time: {one_line(error)}"
        return Outcome("failed", text), signals
    if outcome is None:
        raise RuntimeError(f"the workers of {spec.run_folder} ended without a result")
    return Outcome.from_json(outcome), signals


def _train_here(spec: RunSpec, config: dict[str, Any]) -> None:
    from diffscale.training.parallel import World  # import cost
    from diffscale.training.worker import device_of, train_worker  # import cost

    train_worker(config, World(device=device_of(spec.gpu)))


def _trainer(spec: RunSpec, config: dict[str, Any]) -> Any:
    """Return Ray Train's trainer: it starts the workers, restarts them when one is lost, and evaluates in a task."""
    from ray.train import FailureConfig, RunConfig, ScalingConfig  # import cost

    from diffscale.distributed.connect import HEALTH_TIMEOUT, set_controller_intervals  # import cost
    from diffscale.distributed.lean_trainer import LeanTorchTrainer  # import cost
    from diffscale.distributed.process_group import ProcessGroupConfig  # import cost
    from diffscale.training.async_evaluation import validation_config  # import cost
    from diffscale.training.control import ENVIRONMENT, hang_seconds  # import cost
    from diffscale.training.worker import train_worker  # import cost

    settings, hang = spec.experiment.train, str(hang_seconds())
    set_controller_intervals(settings.min_workers, settings.max_workers)
    os.environ[HEALTH_TIMEOUT] = hang  # Ray Train's controller notices a stopped process, which cannot end itself
    fs, path = storage.filesystem(storage.join(spec.run_folder, "ray"))
    return LeanTorchTrainer(
        train_worker,
        train_loop_config=config,
        torch_config=ProcessGroupConfig("nccl" if spec.gpu else "gloo"),  # type: ignore[arg-type]
        scaling_config=ScalingConfig(
            num_workers=settings.workers,  # type: ignore[arg-type]
            use_gpu=spec.gpu,
            resources_per_worker={"CPU": settings.cpus_per_worker} | ({"GPU": 1} if spec.gpu else {}),
        ),
        run_config=RunConfig(
            name=spec.launch,
            storage_path=path,
            storage_filesystem=fs,
            failure_config=FailureConfig(max_failures=settings.max_failures),
            worker_runtime_env={"env_vars": job_environment() | {ENVIRONMENT: hang}},  # type: ignore[call-arg]
        ),
        validation_config=validation_config(spec.to_json()) if spec.evaluate_async else None,
    )


def _wait_for(fit: Callable[[], Any], interrupted: Callable[[], bool]) -> Exception | None:
    """Run `fit` in a thread, where Ray Train installs no signal handlers, until it ends or the run is interrupted.

    Returns the workers' failure, or None.
    """
    from ray.train import WorkerGroupError  # import cost

    failed: list[BaseException] = []

    def target() -> None:
        try:
            fit()
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=target, daemon=True, name="fit")
    thread.start()
    while thread.is_alive() and not interrupted():
        thread.join(0.2)
    if failed and not isinstance(failed[0], WorkerGroupError):
        raise failed[0]
    return failed[0] if failed else None  # type: ignore[return-value]


@contextmanager
def on_signals(stop: Callable[[], None] | None) -> Iterator[list[int]]:
    """Context in which SIGTERM and the first SIGINT call `stop`. Yields the list of the signals received.

    A second SIGINT does not wait for the checkpoint.
    """
    received: list[int] = []
    if stop is None or threading.current_thread() is not threading.main_thread():
        yield received
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def handler(number: int, _: object) -> None:
        signal.signal(signal.SIGINT, before[signal.SIGINT])
        print(f"{signal.Signals(number).name}: saving a checkpoint", flush=True)
        received.append(number)
        stop()

    for number in before:
        signal.signal(number, handler)
    try:
        yield received
    finally:
        for number, old in before.items():
            signal.signal(number, old)


def resumable_exit_code(signals: tuple[int, ...] | list[int]) -> int:
    """Return the exit code of a command that stopped at a checkpoint: 130 after Ctrl-C, else 143."""
    return EXIT_INTERRUPTED if signal.SIGINT in signals else EXIT_RESUMABLE
