"""What a training step launches on a GPU, counted without one: `python -m benchmarks.throughput.count_launches`.

    python -m benchmarks.throughput.count_launches unet-tiny dit-tiny            # a line for each
    python -m benchmarks.throughput.count_launches dit-xl-2 --batch 32 --top 10  # and the commonest operations

One eager step of the learner in bf16 with AdamW, clipping and one average, on a fake H200 (benchmarks/common/fake_gpu),
with the share of its FLOPs in float32, the kernels of its attention, and what is left once it is captured.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from typing import Annotated, Any

import torch
import typer

from benchmarks.common import fake_gpu
from benchmarks.suites.budget import Images
from diffscale.config.experiment import Experiment
from diffscale.config.factory import build_diffusion, build_model
from diffscale.config.load import validate
from diffscale.models import PRESETS
from diffscale.training.capture import WARM_UP
from diffscale.training.learner import Learner
from diffscale.training.numerics import Numerics, is_spatial_convolution
from diffscale.training.parallel import World

PHASES = {
    "core/keyed_random": "draws",
    "learner.py:draw_noise": "draws",
    "kernels/noise": "draws",
    "training/low_precision": "forward",
    "torch/optim/": "update",
    "training/ema": "update",
    "training/parallel": "update",
    "training/step": "update",
    "learner.py:_finish": "update",
}


def experiment_of(preset: str, batch: int) -> Experiment:
    """Return the settings of a step of a preset: those of the CIFAR-10 suite."""
    published = PRESETS[preset]
    model = {"preset": preset} | ({"out_channels": 0} if "out_channels" in published else {})  # a learned variance
    return validate(
        {
            "name": "launches",
            "data": {"resolution": published["resolution"], "class_conditional": bool(published.get("num_classes"))},
            "model": model,
            "diffusion": {"schedule": "edm_lognormal", "prediction": "F", "weighting": "edm"},
            "optim": {"name": "adamw", "lr": 2e-3, "betas": [0.9, 0.99], "clip_grad_norm": 1.0},
            "train": {"images": 1 << 20, "global_batch": batch, "precision": "bf16", "trackers": []},
            "eval": {"n_generated": 0},
        }
    )


def count(preset: str, batch: int = 256) -> dict[str, Any]:
    """Count a learner's third step, and its fifth, which is recorded. Only in a process of `fake_gpu.environment`."""
    experiment, published = experiment_of(preset, batch), PRESETS[preset]
    side, channels = published["resolution"], published.get("channels", 3)
    data: Any = Images(side, channels, published.get("num_classes", 0))
    classes = experiment.num_classes(data)
    diffusion = build_diffusion(experiment, data)
    with torch.device("meta"):
        model = build_model(experiment, data)
    convolves = any(is_spatial_convolution(module) for module in model.modules())
    torch.cuda.init()
    with fake_gpu.fake_tensors() as mode:
        numerics = Numerics("bf16", channels_last=convolves)
        fake_gpu.to_fake(model, mode, channels_last=convolves)
        world = World(device=fake_gpu.DEVICE)
        graphs = _Graphs()
        learner = Learner(model, diffusion, experiment, world, numerics, classes, None, recorder=graphs)
        images = torch.zeros(batch, channels, side, side, device=fake_gpu.DEVICE)
        whole = torch.zeros(batch, dtype=torch.int64, device=fake_gpu.DEVICE)
        inputs = _Batch(images, whole, whole)
        numbers = learner.draw_numbers(whole)  # by the loader
        with fake_gpu.Launches({}):
            for _ in range(WARM_UP - 1):  # the optimizer makes its state, and the step looks where it computes in bf16
                learner.step(inputs, numbers=numbers)
        with fake_gpu.Launches(PHASES) as launches:
            learner.step(inputs, numbers=numbers)
        with fake_gpu.Launches({}):
            learner.step(inputs, numbers=numbers)  # is recorded
        before = graphs.launched
        with fake_gpu.Launches({}) as captured:
            learner.step(inputs, numbers=numbers)
    commonest = sorted(launches.counts.items(), key=lambda item: -item[1])
    return {
        "preset": preset,
        "batch": batch,
        "parameters": len(list(model.parameters())),
        **{phase: launches.total(phase) for phase in ("draws", "forward", "backward", "update")},
        "launches": launches.total(),
        "casts": sum(launches.casts.values()),
        "host_reads": sum(launches.reads.values()),
        "reads": dict(launches.reads),
        "float32_share": round(launches.flops[torch.float32] / max(sum(launches.flops.values()), 1), 5),
        "attention": launches.attention(),
        "graphs": graphs.launched - before,
        "beside_graphs": {name: n for (_, name), n in captured.counts.items()},
        "commonest": {f"{phase} {name}": n for (phase, name), n in commonest},
    }


class _Graphs:
    """Counts launches of graphs in the place of `CudaGraphs`; without data there is nothing to compute."""

    launched = 0

    def stream(self) -> Any:
        return nullcontext()

    def record(self, function: Callable[[], None]) -> Callable[[], None]:
        return self._launch

    def _launch(self) -> None:
        self.launched += 1


class _Batch:
    """A batch on the device. images: (B, C, H, W). labels, positions: (B,) int64."""

    augment_label = None

    def __init__(self, images: torch.Tensor, labels: torch.Tensor, positions: torch.Tensor) -> None:
        self.images, self.labels, self.positions = images, labels, positions


def counted(presets: list[str], batch: int = 256) -> list[dict[str, Any]]:
    """Return `count` of each preset, from a process of its own."""
    command = [sys.executable, "-m", "benchmarks.throughput.count_launches", *presets, "--batch", str(batch), "--json"]
    done = subprocess.run(command, env=fake_gpu.environment(), capture_output=True, text=True, timeout=600)
    if done.returncode:
        raise RuntimeError(done.stderr[-4000:])
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def main(
    presets: Annotated[list[str], typer.Argument(help="names of presets")],
    batch: Annotated[int, typer.Option(help="images of the step")] = 256,
    top: Annotated[int, typer.Option(help="operations to list")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    if not os.environ.get(fake_gpu.MARK):
        if reason := fake_gpu.unavailable():
            sys.exit(f"cannot count here: {reason}")
        rows = counted(presets, batch)
    else:
        rows = []
        for preset in presets:
            rows.append(count(preset, batch))
            if as_json:
                print(json.dumps(rows[-1]), flush=True)
    if as_json:
        return
    for row in rows:
        commonest = row.pop("commonest")
        print("  ".join(f"{key} {value}" for key, value in row.items()))
        for name, n in list(commonest.items())[:top]:
            print(f"    {n:5d} {name}")


if __name__ == "__main__":
    typer.run(main)
