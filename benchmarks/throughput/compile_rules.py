"""Which networks are faster compiled on this kind of GPU: `python -m benchmarks.throughput.compile_rules [--write]`.

Times a captured training step of each network, its blocks eager and compiled, each pair in a process of its own, and
appends the rows to $OUT/gpu.jsonl. A backbone's rule is the size of the smallest measured network from which on all
gain 5 % or more. `--write` puts the rules in diffscale/training/compile_rules.csv, to be committed. `--dry-run` makes
everything at toy sizes on the CPU, where nothing is captured or compiled, and writes nothing.
"""

from __future__ import annotations

import csv
import datetime
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from benchmarks.common.gpu_timing import DEVICE, ON_GPU, OUT, ROWS, emit, our_step, seconds_of
from benchmarks.throughput.gpu import sized
from diffscale.kernels.runtime import configure_process
from diffscale.models import PRESETS
from diffscale.training.compile_rules import FILE, Rule, read_rules

MODULE = "benchmarks.throughput.compile_rules"
CELL = "compile rule"
GAIN = 1.05
NETWORKS = {  # of each backbone, from small to large, with the batch that fills a GPU of 80 GB
    "dit": (("dit-mini", 256), ("dit-cifar10", 256), ("dit-b-4", 256), ("dit-xl-2", 64)),
    "unet": (("unet-tiny", 256), ("unet-cifar10", 256), ("edm-imagenet64-adm", 48)),
    "rin": (("rin-tiny", 256), ("rin-cifar10", 256), ("rin-imagenet64", 128)),
    "uvit": (("uvit-tiny", 256), ("uvit-cifar10", 256)),
    "jit": (("jit-mini", 256), ("jit-b-16", 96)),
    "hdit": (("hdit-tiny", 256), ("hdit-imagenet128", 32)),
    "edm2": (("edm2-tiny", 256), ("edm2-imagenet64-xs", 64)),
}


def measure(preset: str, batch: int) -> None:
    """Emit the row of a network: milliseconds of a captured step, eager and compiled, and seconds of compiling."""
    backbone = PRESETS[preset]["name"]
    preset, batch = sized(preset, batch)
    row: dict[str, Any] = {}
    for compiled in (False, True):
        step = our_step(preset, batch, graph=ON_GPU, compiled=compiled and ON_GPU)
        started = time.perf_counter()
        step.waiting()
        row["first_step_s"] = round(time.perf_counter() - started, 1)
        row["ms_compiled" if compiled else "ms_eager"] = round(seconds_of(step.ahead) * 1e3, 3)
        row["parameters"] = sum(p.numel() for p in step.learner.model.parameters())
        del step
    emit(cell=CELL, backbone=backbone, network=preset, batch=batch, **row)


def rules_of(rows: list[dict[str, Any]], device: str, measured: str) -> list[Rule]:
    """Return the rule of each backbone that was measured."""
    rules = []
    for backbone in sorted({row["backbone"] for row in rows}):
        least = None
        for row in sorted((r for r in rows if r["backbone"] == backbone), key=lambda r: -r["parameters"]):
            if row["ms_eager"] < GAIN * row["ms_compiled"]:
                break
            least = row["parameters"]
        rules.append(Rule(device, backbone, least, measured))
    return rules


def write(rules: list[Rule], device: str) -> None:
    """Replace the rules of a kind of GPU in the package's table."""
    kept = [rule for rule in read_rules() if rule.device != device]
    place = Path(sys.modules[Rule.__module__].__file__ or "").with_name(FILE)
    with place.open("w", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(Rule.__dataclass_fields__)
        for rule in [*kept, *rules]:
            table.writerow([rule.device, rule.backbone, rule.parameters, rule.measured])


def main(
    seconds: Annotated[float, typer.Option(help="after these no network begins")] = 540,
    only: Annotated[str, typer.Option(help="backbones, separated by commas")] = ",".join(NETWORKS),
    write_rules: Annotated[bool, typer.Option("--write", help="put the rules in the package's table")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="at toy sizes on the CPU")] = False,
    network: Annotated[str, typer.Option(help="measure this one here, as PRESET,BATCH", hidden=True)] = "",
) -> None:
    """Measure the networks and print the rules as JSON lines."""
    if network:
        configure_process(1, DEVICE)
        preset, _, batch = network.partition(",")
        measure(preset, int(batch))
        return
    environment = os.environ | ({"CUDA_VISIBLE_DEVICES": ""} if dry_run else {})
    rows, end, missing = Path(os.environ.get(OUT, ".")) / ROWS, time.monotonic() + seconds, []
    before = len(rows.read_text().splitlines()) if rows.exists() else 0
    for preset, images in (pair for backbone in only.split(",") for pair in NETWORKS[backbone]):
        left = end - time.monotonic()
        command = [sys.executable, "-m", MODULE, "--network", f"{preset},{images}"]
        try:
            if left < 15 or subprocess.run(command, timeout=left, env=environment).returncode:
                missing.append(preset)
        except subprocess.TimeoutExpired:
            missing.append(preset)
    found = [json.loads(line) for line in rows.read_text().splitlines()[before:]] if rows.exists() else []
    device = torch.cuda.get_device_name().split()[-1].split("-")[0] if ON_GPU and not dry_run else "cpu"
    measured = f"{datetime.date.today()} torch {torch.__version__}"
    complete = [row for row in found if row["cell"] == CELL]
    rules = rules_of(complete, device, measured)
    for rule in rules:
        print(json.dumps(rule.__dict__))
    if write_rules and not dry_run:
        write(rules, device)
    if missing:
        print(f"not measured: {', '.join(missing)}", file=sys.stderr)
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
