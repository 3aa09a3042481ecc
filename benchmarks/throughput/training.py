"""What diffscale adds to a bare training loop: `python -m benchmarks.throughput.training CASE [key=value ...]`.

    ray       the loop inside Ray Train, with its clock, history and progress, against a bare loop over the learner
    overhead  seconds that averages, history and checkpoints take, as shares of a step, at their defaults
    workers   two workers of one thread against one worker of two threads
    start     command to first step, and what it goes into

Ratios are of alternating pairs with bootstrap 95 % intervals. The peers' training steps are in
training_step.py. Results: benchmarks/results/throughput/training_CASE.csv.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
import typer

from benchmarks.common.measure import race, write
from diffscale.config.experiment import Experiment
from diffscale.config.factory import build_diffusion, build_model, open_training_data
from diffscale.config.load import load_experiment
from diffscale.core.app import command_app, run_app
from diffscale.core.device import device_name
from diffscale.core.storage import write_bytes
from diffscale.data import Dataset, Loader
from diffscale.kernels.runtime import configure_process
from diffscale.training.learner import Learner
from diffscale.training.numerics import Numerics, choose_numerics
from diffscale.training.parallel import World

app = command_app()
PRESET = "quickstart-unet"


@app.command()
def main(
    case: Annotated[Literal["ray", "overhead", "workers", "start"], typer.Argument()],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="dotted settings")] = None,
    pairs: int = 15,
    steps: Annotated[int, typer.Option(help="steps in one turn")] = 3,
    preset: str = PRESET,
) -> None:
    with tempfile.TemporaryDirectory(prefix="diffscale-bench-") as storage:
        place = os.environ.get("DIFFSCALE_STORAGE", storage)
        settings = [f"storage={place}", f"name=bench-{uuid.uuid4().hex[:8]}", "eval.n_generated=0", "train.trackers=[]"]
        settings += ["train.flops=null", "train.images=100000000", "train.compile=false", "train.workers=1"]
        experiment = load_experiment(preset, [*settings, *(overrides or [])])
        run = {"ray": against_ray, "overhead": overheads, "workers": against_workers, "start": cold_start}[case]
        row = {"preset": preset, "batch": experiment.train.global_batch, **run(experiment, pairs, steps)}
        print(json.dumps(row, indent=1))
        print(write(f"training_{case}", [row]))


def settled(experiment: Experiment, threads: int = 1) -> Numerics:
    """How a run would choose to compute."""
    torch.set_num_threads(threads)
    dataset = open_training_data(experiment)
    return choose_numerics(build_model(experiment, dataset), "cpu", experiment.train)


def make_learner(experiment: Experiment, numerics: Numerics, world: World | None = None) -> tuple[Learner, Dataset]:
    dataset = open_training_data(experiment)
    torch.manual_seed(0)
    model = numerics.prepare(build_model(experiment, dataset))
    diffusion, world = build_diffusion(experiment, dataset), world or World()
    return Learner(model, diffusion, experiment, world, numerics, dataset.num_classes), dataset


def bare(experiment: Experiment, numerics: Numerics, threads: int, world: World | None = None) -> Callable[[int], None]:
    """Return a loop over the learner and nothing else; a call runs the given number of steps."""
    world = world or World()
    configure_process(threads, torch.device("cpu"))
    learner, dataset = make_learner(experiment, numerics, world)
    batch = experiment.train.global_batch
    batches = iter(Loader(dataset, seed=0, global_batch=batch, shard=world.share(batch), flip=True))

    def steps(count: int) -> None:
        for _ in range(count):
            learner.step(next(batches))

    return steps


# ---- Ray against a bare loop


def ray_side(config: dict[str, Any]) -> None:
    """Run in a Ray Train worker: answer each turn with its number and seconds."""
    from diffscale.distributed.messages import Messages  # import cost
    from diffscale.models.cost import Cost  # import cost
    from diffscale.training.trainer import Trainer  # import cost

    channel = Messages(config["launch"])
    experiment = Experiment.model_validate_json(config["experiment"])
    session = Trainer(experiment, config["folder"], World(), Cost(1, 1.0, 1e9), channel)
    turn = 0
    with session.loader():
        channel.put("done", {"turn": 0})
        while (asked := channel.get("turn")) is None or asked["steps"]:
            if asked is None or asked["turn"] == turn:
                time.sleep(0.001)
                continue
            started = time.perf_counter()
            for _ in range(asked["steps"]):
                session.advance()
            turn = asked["turn"]
            channel.put("done", {"turn": turn, "seconds": time.perf_counter() - started})


def against_ray(experiment: Experiment, pairs: int, steps: int) -> dict[str, Any]:
    import threading

    from diffscale.distributed.connect import connect  # import cost

    connect(num_cpus=2)
    from ray.train import RunConfig, ScalingConfig  # import cost
    from ray.train.torch import TorchConfig, TorchTrainer  # import cost

    from diffscale.distributed.messages import Messages  # import cost

    channel = Messages(uuid.uuid4().hex)
    folder, numerics = f"{experiment.storage}/runs/{experiment.name}", settled(experiment)
    stored = {"numerics": asdict(numerics), "device": device_name(torch.device("cpu")), "bit_identical": True}
    write_bytes(f"{folder}/numerics.json", json.dumps(stored).encode())
    config = {"launch": channel.launch, "experiment": experiment.model_dump_json(), "folder": folder}
    trainer = TorchTrainer(
        ray_side,
        train_loop_config=config,
        torch_config=TorchConfig(backend="gloo"),
        scaling_config=ScalingConfig(num_workers=1),
        run_config=RunConfig(name="bench", storage_path=f"{experiment.storage}/ray"),
    )
    thread = threading.Thread(target=trainer.fit, daemon=True)
    thread.start()
    loop = bare(experiment, numerics, threads=1)
    turn = 0
    while channel.get("done") is None:
        time.sleep(0.1)

    def ours() -> None:
        nonlocal turn
        turn += 1
        channel.put("turn", {"turn": turn, "steps": steps})
        while (channel.get("done") or {})["turn"] != turn:
            time.sleep(0.001)

    row = race(ours, lambda: loop(steps), steps, pairs)
    channel.put("turn", {"turn": -1, "steps": 0})
    thread.join(timeout=30)
    return row


# ---- overheads, measured directly


def overheads(experiment: Experiment, pairs: int, steps: int) -> dict[str, Any]:
    """Seconds blocked, as shares of the seconds of a step; a checkpoint is spread over the ten minutes between two."""
    from diffscale.training.checkpoint import saver as saving  # import cost
    from diffscale.training.metrics_log import History, MetricsLog  # import cost
    from diffscale.training.plan import CHECKPOINT_SECONDS, EVERY_STEPS  # import cost

    learner, dataset = make_learner(experiment, settled(experiment))
    batch = experiment.train.global_batch
    metrics = MetricsLog(
        History(f"{experiment.storage}/bench", 0), [], None, World(), "fp32", 1e9, None, EVERY_STEPS * batch, None
    )
    step_seconds, ema_seconds, log_seconds, save_seconds = [], [], [], []
    for i, data in zip(range(pairs), Loader(dataset, seed=0, global_batch=batch, flip=True), strict=False):
        started = time.perf_counter()
        step = learner.step(data)
        step_seconds.append(time.perf_counter() - started)
        started = time.perf_counter()
        learner.ema.update(torch.tensor(learner.ema.shares(learner.images_seen, batch)))
        ema_seconds.append(time.perf_counter() - started)
        started = time.perf_counter()
        for _ in range(EVERY_STEPS):
            metrics.step(step, batch, 1.0, 0.0, 1.0, 0)
        log_seconds.append((time.perf_counter() - started) / EVERY_STEPS)
        if i % 5 == 0:
            started = time.perf_counter()
            saving.snapshot(learner, {}, 0)
            save_seconds.append(time.perf_counter() - started)
    whole, ema, logging, save = (float(np.median(s)) for s in (step_seconds, ema_seconds, log_seconds, save_seconds))
    shares = {"ema": ema / whole, "history": logging / whole, "checkpoint": save / CHECKPOINT_SECONDS}
    return {
        "step_seconds": round(whole, 4),
        **{f"{k}_share": round(v, 6) for k, v in shares.items()},
        "sum_share": round(sum(shares.values()), 5),
        "checkpoint_blocks_seconds": round(save, 4),
        "steps": pairs,
    }


# ---- two workers against one


def group_side(rank: int, folder: str, text: str, numerics: Numerics, pipes: list[Any]) -> None:
    experiment, world = Experiment.model_validate_json(text), World(rank, 2)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    loop = bare(experiment, numerics, threads=1, world=world)
    while steps := pipes[rank].recv():
        loop(steps)
        pipes[rank].send(True)
    dist.destroy_process_group()


def against_workers(experiment: Experiment, pairs: int, steps: int) -> dict[str, Any]:
    context = multiprocessing.get_context("spawn")
    ends = [context.Pipe() for _ in range(2)]
    with tempfile.TemporaryDirectory() as folder:
        text, theirs, numerics = experiment.model_dump_json(), [end for _, end in ends], settled(experiment)
        args = [(rank, folder, text, numerics, theirs) for rank in range(2)]
        ranks = [context.Process(target=group_side, args=of, daemon=True) for of in args]
        for process in ranks:
            process.start()
        loop = bare(experiment, settled(experiment, threads=2), threads=2)

        def ours() -> None:
            for pipe, _ in ends:
                pipe.send(steps)
            for pipe, _ in ends:
                pipe.recv()

        row = race(ours, lambda: loop(steps), steps, pairs)
        for pipe, _ in ends:
            pipe.send(0)
        for process in ranks:
            process.join(timeout=20)
    return row


# ---- cold start


def cold_start(experiment: Experiment, pairs: int, steps: int) -> dict[str, Any]:
    """Three starts of the real command in the foreground; medians of the moments when its files appear."""
    rows = []
    for repeat in range(3):
        name = f"{experiment.name}-{repeat}"
        batch = experiment.train.global_batch
        command = [
            sys.executable,
            "-m",
            "diffscale.train",
            PRESET,
            f"storage={experiment.storage}",
            f"name={name}",
            "eval.n_generated=0",
            "train.trackers=[]",
            "train.flops=null",
            f"train.images={batch}",
            "train.workers=1",
            "train.compile=false",
            f"train.log_every_images={batch}",
            f"train.precision={experiment.train.precision}",
        ]
        started = time.time()
        subprocess.run(command, check=True, capture_output=True)
        ended = time.time()
        folder = next(Path(experiment.storage, "runs").glob(f"{name}-*"))
        first = json.loads((folder / "metrics.jsonl").read_text().splitlines()[0])["time"]
        marks = [
            started,
            os.stat(folder / "provenance.json").st_mtime,
            os.stat(folder / "numerics.json").st_mtime,
            first,
            ended,
        ]
        rows.append(np.diff(marks))
    driver, workers, first_step, rest = np.median(rows, axis=0)
    return {
        "driver_ready_seconds": round(float(driver), 2),
        "ray_and_worker_ready_seconds": round(float(workers), 2),
        "first_step_seconds": round(float(first_step), 2),
        "save_and_end_seconds": round(float(rest), 2),
        "command_to_first_step_seconds": round(float(driver + workers + first_step), 2),
        "starts": len(rows),
        "load_average": round(os.getloadavg()[0], 1),
    }


if __name__ == "__main__":
    run_app(app)
