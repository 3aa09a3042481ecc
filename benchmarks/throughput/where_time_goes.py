"""Which operations a training step spends its time in: `python -m benchmarks.throughput.where_time_goes`.

Self time of torch.profiler's events over a few eager steps, as shares by kind of operation: of both contenders of a
race (ours computed as a run would choose, the peer in the same precision and contiguous), and of the tiny presets of
all backbones. What no event covers (Python, and gaps between operations) is "outside".
Writes benchmarks/results/throughput/where_time_goes.csv.
"""

from __future__ import annotations

from typing import Annotated, Any

import torch
import typer
from torch.profiler import ProfilerActivity, profile, record_function

from benchmarks.common.contenders import RACES, Build, ours
from benchmarks.common.measure import write
from benchmarks.common.stepper import Automatic, Stepper
from diffscale.kernels import group_norm as norm_act
from diffscale.kernels import winograd
from diffscale.kernels.runtime import configure_process
from diffscale.models import PRESETS
from diffscale.training.numerics import Numerics, multiplies_bf16

KINDS = {  # the first kind one of whose words is in the operation's name
    "convolution": ("conv", "cudnn", "winograd"),
    "attention": ("attention", "softmax", "bmm", "flash"),
    "matrix product": ("mm", "linear", "gemm"),
    "norm and activation": ("norm", "silu", "gelu"),
    "optimizer": ("adam",),
    "copy and cast": ("copy", "clone", "contiguous", "to_copy", "cat"),
}


def kind_of(operation: str) -> str:
    name = operation.lower()
    return next((kind for kind, words in KINDS.items() if any(word in name for word in words)), "other")


def seen(holder: Any, kind: str) -> None:
    """Let the profiler see the calls of a holder's C++ kernels, which begin with their names."""
    call = holder.run

    def run(*arguments: Any, **settings: Any) -> None:
        name = next(given for given in arguments if isinstance(given, str))
        with record_function(f"{kind} {name}"):
            call(*arguments, **settings)

    holder.run = run


def shares(build: Build, side: int, batch: int, device: str, steps: int, numerics: Numerics | None) -> dict[str, Any]:
    """Milliseconds of a step and the share of each kind of operation, which sum to 1."""
    stepper = Stepper(build, side, batch, device, numerics, Automatic(compile=False))
    stepper.seconds(2)
    wall = stepper.seconds(steps)
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device == "cuda" else [])
    with profile(activities=activities) as profiler:
        stepper.seconds(steps)
    spent = dict.fromkeys([*KINDS, "other", "outside"], 0.0)
    for event in profiler.key_averages():
        spent[kind_of(event.key)] += event.self_device_time_total if device == "cuda" else event.self_cpu_time_total
    spent["outside"] = max(0.0, wall * 1e6 - sum(spent.values()))
    total = sum(spent.values())
    chosen = stepper.numerics
    row: dict[str, Any] = {"batch": batch, "resolution": side, "device": device, "threads": torch.get_num_threads()}
    row |= {"precision": chosen.precision, "channels_last": chosen.channels_last, "winograd": chosen.winograd}
    row |= {"ms_per_step": f"{wall / steps * 1e3:.1f}"}
    return row | {kind: f"{value / total:.3f}" for kind, value in spent.items()}


def main(
    races: Annotated[list[str] | None, typer.Argument(help="names in contenders.RACES")] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
    threads: Annotated[int, typer.Option(help="CPU threads")] = torch.get_num_threads(),
    steps: Annotated[int, typer.Option(help="profiled steps")] = 3,
) -> None:
    """Profile both contenders of each race, and the tiny presets unless races are named."""
    configure_process(threads, torch.device("cpu"))
    seen(norm_act, "norm")
    seen(winograd.Kernels, "winograd")
    theirs = Numerics("bf16" if multiplies_bf16(device) else "fp32")
    rows = []
    for race in races or ["unet-small", "unet-lucidrains", "uvit-lucidrains", "rin-lucidrains"]:
        entry = RACES[race]
        for network, build, numerics in (("diffscale", entry.ours, None), (entry.peer, entry.theirs, theirs)):
            row = shares(build, entry.side, entry.batch, device, steps, numerics)
            rows.append({"case": race, "network": network} | row)
    rows += [
        {"case": preset, "network": "diffscale"} | shares(ours(preset), 32, 16, device, steps, None)
        for preset in ([] if races else PRESETS)
        if preset.endswith("-tiny")
    ]
    write("where_time_goes", rows)
    for row in rows:
        typer.echo(row)


if __name__ == "__main__":
    typer.run(main)
