"""What each backbone costs at 16 … 256 pixels: `python -m benchmarks.throughput.cost_by_resolution`.

FLOPs are counted; peak memory and the time of a training step (forward, backward, AdamW) are measured, each case in a
process of its own. The networks are the tiny presets, DiT with patches of side/16 so that its tokens stay 256. Writes
cost_by_resolution.csv and .png, and activation_checkpointing.csv, under benchmarks/results/throughput/.
"""

from __future__ import annotations

import platform
import resource
import statistics
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import matplotlib
import torch
import torch.multiprocessing as multiprocessing
import typer

from benchmarks.common.contenders import Wrapped
from benchmarks.common.measure import RESULTS, write
from benchmarks.common.stepper import Automatic, Stepper
from diffscale.kernels.runtime import configure_process
from diffscale.models import PRESETS, create_model
from diffscale.models.cost import count_cost
from diffscale.report.figures.style import style

matplotlib.use("Agg")
import matplotlib.pyplot as plt

SIDES = (16, 32, 64, 128, 256)
PANELS = {
    "training_gflop_per_image": "training GFLOP per image",
    "ms_per_image": "ms per image",
    "peak_mib": "peak memory of the step, MiB",
}


def settings_at(backbone: str, side: int) -> dict[str, Any]:
    """The tiny preset of a backbone at another resolution."""
    extra = {"patch_size": max(side // 16, 1)} if backbone in ("dit", "jit") else {}
    return {"resolution": side} | extra


def measure(backbone: str, side: int, batch: int, device: str, threads: int, checkpointed: bool, results: Any) -> None:
    """Put (peak bytes above the idle network, median seconds of a step) on the queue; runs in a process of its own."""
    configure_process(threads, torch.device("cpu"))

    def build() -> torch.nn.Module:
        model: Any = create_model(f"{backbone}-tiny", **settings_at(backbone, side))
        model.set_activation_checkpointing(checkpointed)
        return Wrapped(model, lambda out: out[0])

    stepper = Stepper(build, side, batch, device, asked=Automatic(channels_last=True, compile=False))
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        idle = torch.cuda.memory_allocated()
    else:
        idle = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    stepper.seconds(2)
    peak = (
        torch.cuda.max_memory_allocated()
        if device == "cuda"
        else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    )
    results.put((peak - idle, statistics.median(stepper.seconds(1) for _ in range(5))))


def case(backbone: str, side: int, batch: int, device: str, threads: int, checkpointed: bool) -> dict[str, Any]:
    """One row: counted FLOPs, measured memory and time."""
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    process = context.Process(target=measure, args=(backbone, side, batch, device, threads, checkpointed, results))
    process.start()
    peak, seconds = results.get()
    process.join()
    build = partial(create_model, f"{backbone}-tiny", **settings_at(backbone, side))
    cost = count_cost(build, side, 3, 0)
    return {
        "backbone": backbone,
        "resolution": side,
        "batch": batch,
        "device": torch.cuda.get_device_name() if device == "cuda" else f"{platform.machine()} × {threads}",
        "activation_checkpointing": checkpointed,
        "parameters": cost.parameters,
        "forward_gmac": f"{cost.forward_macs / 1e9:.4g}",
        "training_gflop_per_image": f"{cost.flops_per_image / 1e9:.4g}",
        "peak_mib": f"{peak / 2**20:.1f}",
        "ms_per_image": f"{seconds / batch * 1e3:.4g}",
    }


@style()
def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Three panels over the resolution, a line for each backbone."""
    figure, axes = plt.subplots(1, 3, figsize=(13, 4), constrained_layout=True)
    for axis, (column, title) in zip(axes, PANELS.items(), strict=True):
        for backbone in sorted({row["backbone"] for row in rows}):
            line = sorted((int(r["resolution"]), float(r[column])) for r in rows if r["backbone"] == backbone)
            axis.plot(*zip(*line, strict=True), marker="o", label=backbone)
        axis.set(title=title, xlabel="resolution", xscale="log", yscale="log")
        axis.set_xticks(SIDES, [str(side) for side in SIDES])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0].legend()
    figure.savefig(path, dpi=120)


def main(
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
    threads: Annotated[int, typer.Option(help="CPU threads")] = torch.get_num_threads(),
    batch: Annotated[int, typer.Option(help="images in a step")] = 4,
    checkpointing_side: Annotated[int, typer.Option(help="resolution of the checkpointing comparison")] = 64,
) -> None:
    """Measure every backbone at every resolution, then activation checkpointing at one."""
    backbones = [name.removesuffix("-tiny") for name in PRESETS if name.endswith("-tiny")]
    rows = []
    for backbone in backbones:
        for side in SIDES:
            rows.append(case(backbone, side, batch, device, threads, False))
            typer.echo(rows[-1])
    write("cost_by_resolution", rows)
    draw(rows, RESULTS / "cost_by_resolution.png")
    pairs = [case(b, checkpointing_side, batch, device, threads, on) for b in backbones for on in (False, True)]
    write("activation_checkpointing", pairs)


if __name__ == "__main__":
    typer.run(main)
