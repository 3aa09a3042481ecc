"""What the solver loop adds to the backbone's own time in sampling: `python -m benchmarks.throughput.solver_overhead`.

Measured directly, as an overhead of a few per cent has to be: while `sample` runs, the seconds inside the network's
forward are summed; the rest of the call is the loop. On CUDA both are measured between synchronisations, which the
sampler itself does not have, so the overhead there is an upper bound. `--clock cpu` counts the process's own CPU time:
for one thread on a machine that does other things too. Target: at most 3 % at batch 64.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Annotated, Any

import numpy as np
import torch
import typer
from torch import nn

from benchmarks.common.measure import interval, write
from diffscale.core.keyed_random import Stream, normal
from diffscale.diffusion import SOLVERS, create_diffusion, keyed_noise, sample
from diffscale.models import create_model

TARGET = 0.03


class Timed(nn.Module):
    """The network, with the seconds spent in its forward."""

    def __init__(self, network: nn.Module, device: torch.device, clock: Callable[[], float]) -> None:
        super().__init__()
        self.network, self.device, self.clock, self.seconds = network, device, clock, 0.0

    def now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return self.clock()

    def forward(self, *arguments: Any, **keywords: Any) -> Any:
        begin = self.now()
        result = self.network(*arguments, **keywords)
        self.seconds += self.now() - begin
        return result


def run_once(network: Timed, solver: Any, batch: int, resolution: int, run: int) -> tuple[float, float]:
    """(seconds in the loop, seconds in the network) of sampling one batch."""
    positions = torch.arange(batch, device=network.device)
    shape = (3, resolution, resolution)
    noise = normal(run, Stream.SAMPLE_NOISE, positions, shape)
    network.seconds = 0.0
    begin = network.now()
    sample(create_diffusion(), network, noise, solver=solver, noise_fn=keyed_noise(run, positions, shape))
    total = network.now() - begin
    return total - network.seconds, network.seconds


def main(
    model: Annotated[str, typer.Option(help="a name that create_model takes")] = "unet-tiny",
    resolution: Annotated[int, typer.Option()] = 32,
    batch: Annotated[int, typer.Option()] = 64,
    steps: Annotated[int, typer.Option(help="noise levels of each run")] = 4,
    runs: Annotated[int, typer.Option(help="runs of each solver, in turn; at least 15")] = 15,
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
    threads: Annotated[int, typer.Option(help="CPU threads")] = torch.get_num_threads(),
    clock: Annotated[str, typer.Option(help="wall, or cpu: the process's CPU time, for one thread")] = "wall",
) -> None:
    """Measure every solver, write the CSV and say which reach the target."""
    torch.set_num_threads(threads)
    where = torch.device(device)
    seconds = time.process_time if clock == "cpu" else time.perf_counter
    network = Timed(create_model(model, resolution=resolution).to(where).eval(), where, seconds)
    solvers = {name: build(steps=steps) for name, build in SOLVERS.items()}
    run_once(network, solvers["ddim"], batch, resolution, 0)  # warm up
    blocked: dict[str, list[tuple[float, float]]] = {name: [] for name in solvers}
    for run in range(runs):
        for name, solver in solvers.items():
            blocked[name].append(run_once(network, solver, batch, resolution, run))
    rows = []
    for name, solver in solvers.items():
        loop, inside = np.array(blocked[name]).T
        low, high = interval(loop / inside)
        rows.append(
            {
                "solver": name,
                "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
                "threads": threads,
                "clock": clock,
                "torch": torch.__version__,
                "model": model,
                "parameters": sum(p.numel() for p in network.network.parameters()),
                "resolution": resolution,
                "batch": batch,
                "steps": steps,
                "nfe": solver.nfe,
                "runs": runs,
                "network_ms_per_evaluation": round(float(np.median(inside)) / solver.nfe * 1e3, 3),
                "loop_ms_per_evaluation": round(float(np.median(loop)) / solver.nfe * 1e3, 3),
                "overhead": round(float(np.median(loop / inside)), 5),
                "overhead_low": round(low, 5),
                "overhead_high": round(high, 5),
                "target": TARGET,
            }
        )
        verdict = "met" if low <= TARGET else "not met"
        typer.echo(f"{name}: {rows[-1]['overhead']:.2%} [{low:.2%}, {high:.2%}] {verdict}")
    write("solver_overhead", rows)


if __name__ == "__main__":
    typer.run(main)
