"""Two workers on this machine: the link as all-reduces show it, the step alone and the step of two."""

from __future__ import annotations

import statistics
import tempfile
import time
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

from benchmarks.scaling.model import Link, bytes_per_step, efficiency
from diffscale.config.factory import open_training_data
from diffscale.config.load import load_experiment
from diffscale.models.cost import count_cost

MEASURED = (("quickstart-unet", 8), ("quickstart-unet", 32), ("quickstart-uvit", 8), ("quickstart-uvit", 32))


def measured(overrides: list[str]) -> list[dict[str, Any]]:
    """Two processes of one thread: the link from all-reduces of several sizes, then for each case the step alone, the
    step of two, and what the model makes of link and step."""
    with tempfile.TemporaryDirectory() as folder:
        experiments = []
        for preset, batch in MEASURED:
            settings = [f"storage={folder}", f"train.global_batch={batch}", "train.images=1000000", "train.flops=null"]
            experiments.append(
                load_experiment(preset, [*settings, "eval.n_generated=0", "train.compile=false", *overrides])
            )
            open_training_data(experiments[-1])
        queue = multiprocessing.get_context("spawn").SimpleQueue()
        texts = [experiment.model_dump_json() for experiment in experiments]
        multiprocessing.spawn(_rank, args=(folder, texts, queue), nprocs=2)
        return queue.get()


def _rank(rank: int, folder: str, texts: list[str], queue: Any) -> None:
    from diffscale.config.experiment import Experiment  # import cost

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    link = _measure_link()
    rows = [_measure_steps(Experiment.model_validate_json(text), rank, link) for text in texts]
    if rank == 0:
        queue.put(rows)
    dist.destroy_process_group()


def _measure_link() -> Link:
    """Least squares over the times of all-reduces between two: 2 hops of latency, and the bytes that each sends."""
    sizes = [4**k for k in range(5, 13)]  # 1,024 to 16.8 million floats
    seconds = []
    for size in sizes:
        flat = torch.zeros(size)
        seconds.append(_median(lambda flat=flat: dist.all_reduce(flat)))
    sent = np.array([bytes_per_step(size, 2, "ddp") for size in sizes])
    weights = 1 / np.array(seconds)  # relative errors count alike
    columns = np.stack([np.full(len(sizes), 2.0), sent], axis=1) * weights[:, None]
    latency, per_byte = np.linalg.lstsq(columns, np.ones(len(sizes)), rcond=None)[0]
    return Link(1 / per_byte, max(float(latency), 0.0), 2, 1 / per_byte)


def _measure_steps(experiment: Any, rank: int, link: Link) -> dict[str, Any]:
    from benchmarks.throughput.training import bare, settled  # import cost
    from diffscale.config.factory import build_model  # import cost
    from diffscale.training.parallel import World  # import cost

    dataset = open_training_data(experiment)
    cost = count_cost(lambda: build_model(experiment, dataset), dataset.resolution, 3, dataset.num_classes)
    half = experiment.train.global_batch // 2
    train = experiment.train.model_copy(update={"global_batch": half})
    numerics = World(rank, 2).from_first(settled(experiment) if rank == 0 else None)
    alone = bare(experiment.model_copy(update={"train": train}), numerics, threads=1)
    together = bare(experiment, numerics, threads=1, world=World(rank, 2))
    dist.barrier()
    one = _median(lambda: alone(1))
    dist.barrier()
    two = _median(lambda: together(1))
    rate = cost.flops_per_image * half / one
    # One core cannot add gradients and compute at once: nothing overlaps.
    predicted = efficiency(cost.parameters, cost.flops_per_image, half, 2, rate, link, overlap=0.0)
    return {
        "preset": experiment.name,
        "images_per_device": half,
        "parameters": cost.parameters,
        "flops_per_step_and_device": cost.flops_per_image * half,
        "bytes_per_step_and_device": bytes_per_step(cost.parameters, 2, "ddp"),
        "link_bytes_per_second": round(link.bandwidth),
        "link_latency_seconds": round(link.latency, 7),
        "flops_per_second": round(rate),
        "step_alone_seconds": round(one, 4),
        "step_of_two_seconds": round(two, 4),
        "efficiency_measured": round(one / two, 4),
        "efficiency_predicted": round(predicted, 4),
        "kind": "measured",
    }


def _median(call: Any, repeats: int = 9) -> float:
    call()
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)
