"""What keeps a GPU from working at full speed on a suite's small networks: `python -m benchmarks.throughput.gpu_steps`.

For each backbone of the CIFAR-10 suite at its GPU size, eager and in both precisions: milliseconds of a step of the
learner without Ray, how many of them the GPU is busy, and whether the same steps from the
same start end in the same weights. Writes benchmarks/results/throughput/gpu_steps.csv.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Annotated, Any

import torch
import typer
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from benchmarks.common.measure import write
from benchmarks.suites.budget import Images
from benchmarks.suites.suite import load_suite
from diffscale.config.experiment import Experiment
from diffscale.config.factory import build_diffusion, build_model
from diffscale.core.device import matmul_rate
from diffscale.kernels.runtime import configure_process
from diffscale.models.cost import count_cost
from diffscale.training.learner import Learner
from diffscale.training.numerics import Numerics, Precision
from diffscale.training.parallel import World

DATA: Any = Images(32, 3, 0)
WARM_UP, PROFILED = 3, 3


@dataclass(frozen=True)
class RandomBatch:
    images: Tensor
    labels: Tensor
    positions: Tensor

    @classmethod
    def of(cls, size: int, first: int) -> RandomBatch:
        images = torch.randn(size, 3, 32, 32, generator=torch.Generator().manual_seed(first)).clamp(-1, 1)
        return cls(images, torch.zeros(size, dtype=torch.long), torch.arange(first, first + size))


def learner(experiment: Experiment, numerics: Numerics, device: torch.device) -> Learner:
    torch.manual_seed(0)
    model = numerics.prepare(build_model(experiment, DATA).to(device))
    return Learner(model, build_diffusion(experiment, DATA), experiment, World(device=device), numerics)


def measure(experiment: Experiment, precision: Precision, device: torch.device, steps: int) -> dict[str, Any]:
    """One row. steps: timed, after three that are not."""
    size = experiment.train.global_batch
    batches = [RandomBatch.of(size, i * size) for i in range(2)]
    convolutional = any(
        isinstance(m, nn.Conv2d) and m.kernel_size != m.stride for m in build_model(experiment, DATA).modules()
    )
    numerics, ends = Numerics(precision, channels_last=convolutional), []
    for _ in range(2):
        ours = learner(experiment, numerics, device)
        for i in range(WARM_UP):
            ours.step(batches[i % 2])
        started = time.perf_counter()
        for i in range(steps):
            ours.step(batches[i % 2])  # each waits for its loss, so for the GPU
        seconds = (time.perf_counter() - started) / steps
        ends.append([p.detach().cpu() for p in ours.model.parameters()])
    with profile(activities=[ProfilerActivity.CUDA], acc_events=True) as profiler:
        for i in range(PROFILED):
            ours.step(batches[i % 2])
    events = profiler.key_averages()
    flops = count_cost(lambda: build_model(experiment, DATA), 32, 3, 0).flops_per_image * size / seconds
    return {
        "network": experiment.name.rpartition("-")[2],
        "precision": precision,
        "batch": size,
        "ms_per_step": round(seconds * 1e3, 1),
        "gpu_busy_ms": round(sum(e.self_device_time_total for e in events) / PROFILED / 1e3, 2),
        "flop_per_s": f"{flops:.3g}",
        "mfu": f"{flops / matmul_rate(device, precision):.4f}",
        "same_weights_twice": all(torch.equal(a, b) for a, b in zip(*ends, strict=True)),
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
    }


def main(steps: Annotated[int, typer.Option(help="timed steps")] = 15) -> None:
    device = torch.device("cuda")
    configure_process(4, device)
    experiments = [e for e in load_suite("cifar10").experiments(gpu=True) if e.train.seed == 0]
    precisions: tuple[Precision, ...] = ("bf16", "fp32")
    rows = [measure(e, precision, device, steps) for e in experiments for precision in precisions]
    for row in rows:
        print(row)
    print(write("gpu_steps", rows))


if __name__ == "__main__":
    typer.run(main)
