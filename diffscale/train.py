"""`python -m diffscale.train PRESET_OR_FILE [key=value ...]`: one run, through Ray Train.

The same command again goes on from the newest good checkpoint; a finished run says that it is finished. Exit codes: 0
finished, 2 a setting is wrong, 3 stopped at a good checkpoint because going on is pointless (non-finite losses, a
damaged shard, a full disk), 143 stopped by SIGTERM or train.wall_seconds and to be resumed, 130 the same by Ctrl-C.
"""

from __future__ import annotations

import os
import signal
import threading
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from diffscale.config.experiment import Experiment
from diffscale.config.load import load_experiment
from diffscale.core import storage
from diffscale.core.app import run_app
from diffscale.core.device import Cost
from diffscale.core.errors import UserError
from diffscale.records.store import Record

if TYPE_CHECKING:
    from diffscale.data import Dataset

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
EXIT_STOPPED, EXIT_RESUMABLE = 3, 143
ShouldStop = Callable[[Record], bool]
received: list[int] = []  # signals that asked this command to stop


@dataclass(frozen=True)
class RunResult:
    """Where the run is and how far. reason: finished, early (should_stop), signal, wall, nonfinite, data, storage,
    evaluation (trained to the end, but an evaluation beside it failed)."""

    run_folder: str
    run_id: str
    images_seen: int
    reason: str
    message: str = ""

    @property
    def finished(self) -> bool:
        return self.reason == "finished"

    @property
    def stopped(self) -> bool:
        return self.reason == "early"


@app.command()
def main(
    preset: Annotated[str, typer.Argument(metavar="PRESET_OR_FILE", help="a preset of the package or a YAML file")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="dotted settings")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="print settings and costs; start nothing")] = False,
    replay: Annotated[bool, typer.Option("--replay", help="repeat the batches that were not finite")] = False,
) -> None:
    """Train one run, or go on with it."""
    experiment = load_experiment(preset, overrides or [])
    if dry_run:
        from diffscale.training.dry_run import describe

        print(describe(experiment))
        return
    if replay:
        from diffscale.training.replay import replay as replay_run

        print(replay_run(experiment))
        return
    result = run(experiment, handle_signals=True)
    console = Console()
    if result.finished:
        console.print(f"finished: {result.images_seen:,} images, {result.run_folder}", highlight=False, soft_wrap=True)
        return
    if result.reason in ("signal", "wall"):
        text = f"stopped at {result.images_seen:,} images; the same command resumes: {result.run_folder}"
        console.print(text, highlight=False, soft_wrap=True)
        raise typer.Exit(130 if signal.SIGINT in received else EXIT_RESUMABLE)
    console.print(f"stopped ({result.reason}): {result.message}", highlight=False, soft_wrap=True)
    if result.reason == "nonfinite":
        console.print("the same command with --replay repeats those batches and says what was not finite")
    raise typer.Exit(EXIT_STOPPED)


def run(
    experiment: Experiment,
    *,
    should_stop: ShouldStop | None = None,
    show: bool = True,
    handle_signals: bool = False,
    stop_with: str | None = None,
    here: bool = False,
) -> RunResult:
    """Trains to the budget and evaluates at its points; resumes what is in the run's folder. Callable in a Tune trial.

    should_stop: asked on rank 0 about each record when it is written (it travels to the worker); True ends the run
    early at a checkpoint. show: progress on the console. handle_signals: SIGTERM and SIGINT end the run at a
    checkpoint (main thread only). stop_with: the launch of a channel (distributed/messages.py) whose STOP does the same.
    here: the one worker is this process, without Ray Train; it raises what the training raises.
    Raises UserError for what cannot work, before any training is started where that can be known.
    """
    from diffscale.training.setting_up import settled, uses_gpu

    dataset, cost = _prepare_while_ray_starts(experiment)
    experiment = settled(experiment, dataset)
    run_id, folder = experiment.run_id(dataset.content_hash), experiment.run_folder(dataset.content_hash)
    done = _already(experiment, folder, cost)
    if done is not None:
        if show:
            Console().print(f"{experiment.name}: already finished", highlight=False)
        return RunResult(folder, run_id, done, "finished")
    _write_once(folder, experiment, dataset)
    from diffscale.preflight.shared_storage import require_shared

    require_shared(experiment.storage)
    from diffscale.distributed.messages import OUTCOME, STOP, Channel
    from diffscale.training import async_evaluation as beside
    from diffscale.training.progress import Display

    channel, gpu = Channel(uuid.uuid4().hex), uses_gpu(experiment)
    stop = (lambda: channel.put(STOP, {})) if handle_signals else None
    config = {
        "experiment": experiment.model_dump_json(), "run_folder": folder, "cost": list(cost), "launch": channel.launch,
        "should_stop": should_stop, "gpu": gpu, "stop_with": stop_with,
        "evaluate_beside": beside.wanted(experiment, gpu, should_stop is not None or stop_with is not None),
    }  # fmt: skip

    def interrupted() -> bool:
        """Whether the run has stopped before its end: evaluations beside it are left to the next launch."""
        return (channel.get(OUTCOME) or {}).get("reason") in ("signal", "wall")

    try:
        with Display(channel, experiment.name, show):
            error = None
            if here:
                _train_here(config)
            else:
                error = _fit(experiment, folder, config, stop, interrupted)
        outcome = channel.get(OUTCOME)
    finally:
        channel.close()
    if outcome is None:
        raise RuntimeError(f"the workers of {folder} ended without a result") from error
    if outcome["reason"] == "finished" and config["evaluate_beside"]:
        outcome |= _left_unjudged(experiment, folder, cost)
    return _result(folder, run_id, outcome)


def _prepare_while_ray_starts(experiment: Experiment) -> tuple[Dataset, Cost]:
    """`prepare`, in a thread: the processes that Ray starts end with the thread that has started them."""
    from diffscale.distributed.connect import connect

    with ThreadPoolExecutor(1, thread_name_prefix="prepare") as pool:
        prepared = pool.submit(prepare, experiment)
        connect(num_cpus=_cpus_needed(experiment))
        return prepared.result()


def prepare(experiment: Experiment) -> tuple[Dataset, Cost]:
    """The dataset and the cost per image; raises UserError for settings that no worker could use."""
    from diffscale.config.factory import build_diffusion, build_model, build_solver, open_training_data
    from diffscale.core.device import count_cost
    from diffscale.evaluation import parse_metric
    from diffscale.training.ema import ema_name
    from diffscale.training.optimizer import check_name

    train = experiment.train
    fewest = train.workers if isinstance(train.workers, int) else train.workers[1]
    if fewest > train.global_batch:
        raise UserError(
            setting="train.workers",
            value=train.workers,
            expected=f"at most one worker per image of train.global_batch ({train.global_batch})",
        )
    dataset = open_training_data(experiment)
    build_diffusion(experiment, dataset)
    build_solver(experiment)
    _refuse_unsupported(experiment)
    check_name(experiment.optim.name)
    for metric in experiment.eval.metrics:
        parse_metric(metric)
    try:
        ema_name(experiment.eval.ema)
    except ValueError as error:
        raise UserError(setting="eval.ema", value=experiment.eval.ema, expected=str(error)) from None
    classes = dataset.num_classes if experiment.data.class_conditional else 0
    cost = count_cost(lambda: build_model(experiment, dataset), dataset.resolution, dataset.channels, classes)
    return dataset, cost


def _refuse_unsupported(experiment: Experiment) -> None:
    """Raises UserError for settings that would otherwise be ignored or fail in the middle."""
    if experiment.data.augment and getattr(experiment.model, "augment_dim", 0) != 9:
        raise UserError(
            setting="data.augment",
            value=experiment.data.augment,
            expected="0, or a model that is told what was done to its images, so that they do not leak into samples",
            fix="model.augment_dim=9 (unet and edm2 have it)",
        )


def _cpus_needed(experiment: Experiment) -> int | None:
    """CPUs to give a private cluster that has fewer than the run asks for: workers then share them."""
    train = experiment.train
    fewest = train.workers if isinstance(train.workers, int) else train.workers[0]
    if experiment.eval.workers == "own" and experiment.eval.n_generated:
        fewest += 1
    return max(fewest * train.cpus_per_worker, os.cpu_count() or 1)


def _already(experiment: Experiment, folder: str, cost: Cost) -> int | None:
    """Images seen of a run whose newest checkpoint has used the budget and whose evaluations are all there."""
    from diffscale.training.checkpoint.layout import list_checkpoints, read_state
    from diffscale.training.checkpoint.tensors import Damaged
    from diffscale.training.checkpoint_evaluation import unjudged
    from diffscale.training.plan import make_plan

    plan = make_plan(experiment, cost.flops_per_image)
    for checkpoint in reversed(list_checkpoints(folder)):
        try:
            state = read_state(checkpoint)
        except Damaged:
            continue
        images = int(state["images_seen"])
        if not plan.finished(images, state["device_seconds"]):
            return None
        return None if unjudged(folder, experiment, plan.points, map(int, state["values"])) else images
    return None


def _left_unjudged(experiment: Experiment, folder: str, cost: Cost) -> dict[str, str]:
    """What an outcome is instead of finished where evaluations beside the training have failed."""
    from diffscale.training.checkpoint_evaluation import unjudged
    from diffscale.training.plan import make_plan

    left = unjudged(folder, experiment, make_plan(experiment, cost.flops_per_image).points)
    if not left:
        return {}
    images = ", ".join(f"{i:,}" for i in left)
    return {"reason": "evaluation", "message": f"trained to the end, but the evaluations at {images} images failed"}


def _write_once(folder: str, experiment: Experiment, dataset: Dataset) -> None:
    """experiment.yaml and provenance.json; the settings of the latest launch, the provenance of every one."""
    import json
    import time

    from diffscale.core.provenance import source, versions
    from diffscale.training.checkpoint.layout import save_settings

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


def _train_here(config: dict[str, Any]) -> None:
    from diffscale.training.parallel import World
    from diffscale.training.worker import device_of, run_session

    run_session(config, World(device=device_of(config)))


def _fit(
    experiment: Experiment,
    folder: str,
    config: dict[str, Any],
    stop: Callable[[], None] | None,
    interrupted: Callable[[], bool],
) -> Exception | None:
    """Ray Train's part: starts the workers, starts them again when one is lost, waits for evaluations beside them."""
    from ray.train import FailureConfig, RunConfig, ScalingConfig

    from diffscale.core.provenance import job_environment
    from diffscale.distributed.connect import HEALTH_TIMEOUT
    from diffscale.distributed.lean_trainer import Trainer
    from diffscale.distributed.process_group import ProcessGroupConfig
    from diffscale.training import async_evaluation as beside
    from diffscale.training import health
    from diffscale.training.worker import train_worker

    train = experiment.train
    hang = str(health.hang_seconds())
    os.environ[HEALTH_TIMEOUT] = hang  # Ray Train's controller notices a stopped process, which cannot end itself
    fs, path = storage.filesystem(storage.join(folder, "ray"))
    trainer = Trainer(
        train_worker,
        train_loop_config=config,
        torch_config=ProcessGroupConfig("nccl" if config["gpu"] else "gloo"),  # type: ignore[arg-type]
        scaling_config=ScalingConfig(
            num_workers=train.workers,  # type: ignore[arg-type]
            use_gpu=config["gpu"],
            resources_per_worker={"CPU": train.cpus_per_worker} | ({"GPU": 1} if config["gpu"] else {}),
        ),
        run_config=RunConfig(
            name=config["launch"],
            storage_path=path,
            storage_filesystem=fs,
            failure_config=FailureConfig(max_failures=train.max_failures),
            worker_runtime_env={"env_vars": job_environment() | {health.ENVIRONMENT: hang}},  # type: ignore[call-arg]
        ),
        validation_config=beside.validation_config(config) if config["evaluate_beside"] else None,
    )
    return _in_thread(trainer.fit, stop, interrupted)


def _in_thread(
    fit: Callable[[], Any], stop: Callable[[], None] | None, interrupted: Callable[[], bool]
) -> Exception | None:
    """Runs `fit` in a thread, where Ray Train takes no signals for itself, so that SIGTERM and SIGINT can mean: save a
    checkpoint and stop. A second SIGINT does not wait for that. Gives the failure of the workers, if there was one."""
    from ray.train import WorkerGroupError

    failed: list[BaseException] = []

    def target() -> None:
        try:
            fit()
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=target, daemon=True, name="fit")
    with on_signals(stop):
        thread.start()
        while thread.is_alive() and not interrupted():
            thread.join(0.2)
    if failed and not isinstance(failed[0], WorkerGroupError):
        raise failed[0]
    return failed[0] if failed else None  # type: ignore[return-value]


@contextmanager
def on_signals(stop: Callable[[], None] | None) -> Iterator[None]:
    """While inside, SIGTERM and the first SIGINT call `stop`."""
    if stop is None or threading.current_thread() is not threading.main_thread():
        yield
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
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


def _result(folder: str, run_id: str, outcome: dict[str, Any]) -> RunResult:
    if outcome["reason"] == "refused":
        raise UserError(**outcome["error"])
    message = outcome.get("message", "")
    if "error" in outcome:
        message = UserError(**outcome["error"]).text()
    return RunResult(folder, run_id, int(outcome.get("images_seen", 0)), outcome["reason"], message)


if __name__ == "__main__":
    run_app(app)
