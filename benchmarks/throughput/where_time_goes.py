"""Which operations a training step spends its time in: `python -m benchmarks.throughput.where_time_goes`.

Self time of torch.profiler's events over a few eager steps of each contender of a race, as shares by kind of operation.
Writes benchmarks/results/throughput/where_time_goes.csv.
"""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch.profiler import ProfilerActivity, profile

from benchmarks.throughput.contenders import RACES
from benchmarks.throughput.stepper import Stepper
from diffscale.training.numerics import Numerics

RESULTS = Path(__file__).parents[1] / "results" / "throughput" / "where_time_goes.csv"
KINDS = {  # the first kind one of whose words is in the operation's name
    "convolution": ("conv", "cudnn"),
    "attention": ("attention", "softmax", "bmm", "flash"),
    "matrix product": ("mm", "linear", "gemm"),
    "norm and activation": ("norm", "silu", "gelu"),
    "optimizer": ("adam",),
    "copy and cast": ("copy", "clone", "contiguous", "to_copy", "cat"),
}


def kind_of(operation: str) -> str:
    name = operation.lower()
    return next((kind for kind, words in KINDS.items() if any(word in name for word in words)), "other")


def shares(race: str, side: str, device: str, steps: int) -> dict[str, Any]:
    """One row: milliseconds of a step and the share of each kind of operation, which sum to 1."""
    entry = RACES[race]
    build, ours = (entry.ours, True) if side == "ours" else (entry.theirs, False)
    stepper = Stepper(build, entry.side, entry.batch, device, Numerics("bf16", channels_last=ours and race[0] == "u"))
    stepper.seconds(2)
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device == "cuda" else [])
    with profile(activities=activities) as profiler:
        stepper.seconds(steps)
    spent = dict.fromkeys([*KINDS, "other"], 0.0)
    for event in profiler.key_averages():
        spent[kind_of(event.key)] += event.self_device_time_total if device == "cuda" else event.self_cpu_time_total
    total = sum(spent.values())
    row = {"race": race, "side": side, "network": "diffscale" if ours else entry.peer, "device": device}
    row |= {"ms_per_step": f"{total / steps / 1e3:.1f}"}
    return row | {kind: f"{value / total:.3f}" for kind, value in spent.items()}


def main(
    races: Annotated[list[str] | None, typer.Argument(help="names in contenders.RACES")] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
    threads: Annotated[int, typer.Option(help="CPU threads")] = torch.get_num_threads(),
    steps: Annotated[int, typer.Option(help="profiled steps")] = 3,
    out: Annotated[Path, typer.Option(help="CSV to write")] = RESULTS,
) -> None:
    """Profile both contenders of each race."""
    torch.set_num_threads(threads)
    chosen = races or ["unet-small", "unet-lucidrains", "uvit-lucidrains", "rin-lucidrains"]
    rows = [shares(race, side, device, steps) for race in chosen for side in ("ours", "peer")]
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    for row in rows:
        typer.echo(row)


if __name__ == "__main__":
    typer.run(main)
