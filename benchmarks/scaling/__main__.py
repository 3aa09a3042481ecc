"""`python -m benchmarks.scaling`: measures two workers on this machine, checks the model against it, and projects.

Writes benchmarks/results/scaling/measured.csv (this machine: gloo's rate, the step, predicted and measured efficiency
of two workers) and projected.csv (published networks on 8, 64 and 1,024 GPUs; nothing in it was measured: the rates
of the GPU and of its links are the manufacturer's, times the shares named in the columns).
"""

from __future__ import annotations

import csv
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

from benchmarks.scaling.model import Link, bytes_per_step, efficiency
from diffscale.build import open_training_data
from diffscale.cli import load_experiment
from diffscale.compute import count_cost
from diffscale.models import PRESETS, create_model

RESULTS = Path(__file__).parents[1] / "results" / "scaling"
PEAK = 989e12  # FLOP/s of an H100 SXM in bf16, dense, by its data sheet
MFU = 0.4  # assumed share of it in training
# NVLink 4: 450 GB/s a direction, of which rings reach some 80 %; one 400 Gb/s adapter for each GPU between nodes.
H100 = Link(bandwidth=360e9, latency=5e-6, node=8, bandwidth_between=45e9)
DEVICES = (8, 64, 1024)
GLOBAL_BATCH = 2048
PROJECTED = (
    "edm-cifar10-ddpmpp", "adm-imagenet64", "edm2-imagenet64-s", "edm2-imagenet512-xxl", "uvit-imagenet256",
    "rin-imagenet64", "dit-s-2", "dit-xl-2", "jit-b-16", "hdit-imagenet128",
)  # fmt: skip


def main() -> None:
    RESULTS.mkdir(parents=True, exist_ok=True)
    _write("measured.csv", [measured()])
    _write("projected.csv", projected())


def projected() -> list[dict[str, Any]]:
    """A global batch of 2,048 shared among the devices (strong scaling), against as many devices that need not talk."""
    rows = []
    for name in PROJECTED:
        settings = PRESETS[name]
        given = {k: v for k, v in settings.items() if k != "name"}
        resolution, channels = given["resolution"], given.get("channels", 3)
        model = lambda s=settings, g=given: create_model(s["name"], **g)  # noqa: E731
        cost = count_cost(model, resolution, channels, given.get("num_classes", 0))
        for devices in DEVICES:
            images = GLOBAL_BATCH / devices
            for parallel in ("ddp", "fsdp2"):
                value = efficiency(
                    cost.parameters, cost.flops_per_image, images, devices, PEAK * MFU, H100, parallel, overlap=0.8
                )
                rows.append(
                    {
                        "preset": name, "devices": devices, "parallel": parallel, "images_per_device": images,
                        "parameters": cost.parameters, "flops_per_image": cost.flops_per_image,
                        "flops_per_step_and_device": cost.flops_per_image * images,
                        "bytes_per_step_and_device": bytes_per_step(cost.parameters, devices, parallel),
                        "efficiency": round(value, 4), "kind": "projected", "assumed_mfu": MFU, "assumed_overlap": 0.8,
                    }
                )  # fmt: skip
    return rows


def measured() -> dict[str, Any]:
    """Two processes of one thread: gloo's rate, the step alone, and the step together."""
    settings = ["eval.n_generated=0", "train.images=1000000", "train.flops=null", "train.compile=false"]
    with tempfile.TemporaryDirectory() as folder:
        experiment = load_experiment("quickstart-unet", [f"storage={folder}", *settings])
        open_training_data(experiment)
        queue = multiprocessing.get_context("spawn").SimpleQueue()
        multiprocessing.spawn(_rank, args=(folder, experiment.model_dump_json(), queue), nprocs=2)
        return queue.get() | {"kind": "measured", "load_average": round(os.getloadavg()[0], 1)}


def _rank(rank: int, folder: str, text: str, queue: Any) -> None:
    from benchmarks.throughput.training import bare, settled
    from diffscale.build import build_model
    from diffscale.experiment import Experiment
    from diffscale.training.parallel import World

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    experiment = Experiment.model_validate_json(text)
    dataset = open_training_data(experiment)
    cost = count_cost(lambda: build_model(experiment, dataset), dataset.resolution, 3, dataset.num_classes)
    flat = torch.zeros(cost.parameters)
    ring = _median(lambda: dist.all_reduce(flat))
    half = experiment.train.global_batch // 2
    train = experiment.train.model_copy(update={"global_batch": half})
    numerics = World(rank, 2).from_first(settled(experiment) if rank == 0 else None)
    alone = bare(experiment.model_copy(update={"train": train}), numerics, threads=1)
    together = bare(experiment, numerics, threads=1, world=World(rank, 2))
    dist.barrier()
    one = _median(lambda: alone(1))
    dist.barrier()
    two = _median(lambda: together(1))
    sent = bytes_per_step(cost.parameters, 2, "ddp")
    link = Link(sent / ring, 0.0, 2, sent / ring)
    rate = cost.flops_per_image * half / one
    # One core cannot add gradients and compute at once: nothing overlaps.
    predicted = efficiency(cost.parameters, cost.flops_per_image, half, 2, rate, link, overlap=0.0)
    if rank == 0:
        queue.put(
            {
                "preset": "quickstart-unet", "parameters": cost.parameters, "flops_per_step_and_device": rate * one,
                "bytes_per_step_and_device": sent, "all_reduce_bytes_per_second": round(sent / ring),
                "flops_per_second": round(rate), "step_alone_seconds": round(one, 4),
                "step_of_two_seconds": round(two, 4), "efficiency_measured": round(one / two, 4),
                "efficiency_predicted": round(predicted, 4),
            }
        )  # fmt: skip
    dist.destroy_process_group()


def _median(call: Any, repeats: int = 9) -> float:
    call()
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


def _write(name: str, rows: list[dict[str, Any]]) -> None:
    with open(RESULTS / name, "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    print(RESULTS / name)


if __name__ == "__main__":
    main()
