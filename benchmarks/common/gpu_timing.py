"""What the runs on a GPU share: our training step from a preset, times, what the GPU was busy with, rows on disk."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from benchmarks.suites.budget import Images
from diffscale.config.experiment import Experiment
from diffscale.config.factory import build_diffusion, build_model
from diffscale.config.load import validate
from diffscale.core.device import matmul_rate, synchronize
from diffscale.models import PRESETS
from diffscale.models.cost import count_cost
from diffscale.training.learner import Learner
from diffscale.training.numerics import Numerics, choose_numerics
from diffscale.training.parallel import World

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
H200_PEAK = 989e12  # FLOP/s of dense bf16 products, NVIDIA's data sheet of the H200 and H100 SXM
OUT, ROWS = "OUT", "gpu.jsonl"
WARM_UP = 5  # calls: a step is recorded as a graph at its fourth


def emit(**row: Any) -> None:
    """Print a row and append it to $OUT/gpu.jsonl, on disk before this returns."""
    made = {"torch": torch.__version__, "device": torch.cuda.get_device_name() if ON_GPU else "cpu"}
    row = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in (made | row).items()}
    line = json.dumps(row)
    print(line, flush=True)
    with (Path(os.environ.get(OUT, ".")) / ROWS).open("a", encoding="utf-8") as file:
        file.write(line + "\n")
        file.flush()
        os.fsync(file.fileno())


def seconds_of(call: Callable[[], Any], budget: float = 1.5) -> float:
    """Return the median seconds of a call, after some; the device is waited for after each group of calls."""
    budget = budget if ON_GPU else 0.01
    for _ in range(WARM_UP if ON_GPU else 1):
        call()
    synchronize(DEVICE)
    started = time.perf_counter()
    call()
    synchronize(DEVICE)
    group = max(1, int(budget / 5 / max(time.perf_counter() - started, 1e-5)))
    taken: list[float] = []
    end = time.perf_counter() + 2 * budget
    while len(taken) < 5 and (len(taken) < 2 or time.perf_counter() < end):
        started = time.perf_counter()
        for _ in range(group):
            call()
        synchronize(DEVICE)
        taken.append((time.perf_counter() - started) / group)
    return sorted(taken)[len(taken) // 2]


def busy(call: Callable[[], Any], calls: int = 3) -> tuple[float, int]:
    """Return the seconds that a GPU's kernels ran in one call, and how many kernels; (nan, 0) without a GPU."""
    if not ON_GPU:
        return math.nan, 0
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        for _ in range(calls):
            call()
        synchronize(DEVICE)
    events = [e for e in seen.events() or [] if e.device_type == torch.autograd.DeviceType.CUDA]
    return sum(e.self_device_time_total for e in events) / calls / 1e6, len(events) // calls


def ceiling() -> float:
    """Return the FLOP/s of a large bf16 product here and now."""
    return matmul_rate(DEVICE, "bf16" if ON_GPU else "fp32")


@dataclass(frozen=True)
class StaticBatch:
    """The same images in every step."""

    images: Tensor
    labels: Tensor
    positions: Tensor


@dataclass
class OurStep:
    """A whole optimisation step of a preset, as a run makes it."""

    learner: Learner
    batch: StaticBatch
    numbers: dict[str, Tensor]  # of each sample, which a run's loader draws
    flops: float  # of one step

    def ahead(self) -> None:
        """Launch a step without waiting for it."""
        self.learner.launch(self.batch, numbers=self.numbers)

    def waiting(self) -> None:
        """Make a step and wait for its loss."""
        self.learner.step(self.batch, numbers=self.numbers)

    def weights(self) -> Tensor:
        return torch.cat([p.detach().flatten().cpu() for p in self.learner.model.parameters()])

    @property
    def images(self) -> int:
        return len(self.batch.positions)


def our_step(
    preset: str,
    batch: int,
    *,
    compiled: bool = False,
    graph: bool = False,
    exact: bool = True,
    channels_last: bool | None = None,
    accelerated: bool = True,
    **settings: Any,
) -> OurStep:
    """Build the step of a preset in bf16, on a CPU in float32; weights are the same for the same preset.

    compiled, graph, exact: as `train.compile`, `train.graph` and `train.exact`
    channels_last: memory order; None is the rule's
    accelerated: False leaves out what `models/accelerate.py` installs
    settings: of the model, in place of the preset's
    """
    published = PRESETS[preset] | settings
    data = Images(published["resolution"], published.get("channels", 3), published.get("num_classes", 0))
    experiment = _experiment(preset, data.resolution, settings, batch, graph)
    torch.manual_seed(0)
    model: nn.Module = build_model(experiment, data).to(DEVICE)  # type: ignore[arg-type]
    rule = choose_numerics(model, "cuda", experiment.train, bf16=True)
    last = rule.channels_last if channels_last is None else channels_last
    numerics = Numerics("bf16" if ON_GPU else "fp32", last, compiled, exact=exact)
    if accelerated:
        numerics.prepare(model)
    else:
        model.to(memory_format=torch.channels_last if last else torch.contiguous_format)
    diffusion, world = build_diffusion(experiment, data), World(device=DEVICE)  # type: ignore[arg-type]
    learner = Learner(model, diffusion, experiment, world, numerics, data.num_classes)
    shape = (batch, data.channels, data.resolution, data.resolution)
    images = torch.randn(shape, generator=torch.Generator().manual_seed(1)).clamp(-1, 1).to(DEVICE)
    labels = torch.zeros(batch, dtype=torch.long, device=DEVICE)
    cost = count_cost(
        lambda: build_model(experiment, data),  # type: ignore[arg-type]
        data.resolution,
        data.channels,
        data.num_classes,
    )
    static = StaticBatch(numerics.order(images), labels, torch.arange(batch, device=DEVICE))
    return OurStep(learner, static, learner.draw_numbers(static.positions), cost.flops_per_image * batch)


def _experiment(preset: str, side: int, settings: dict[str, Any], batch: int, graph: bool) -> Experiment:
    model = settings | {"preset": preset}
    if "out_channels" in PRESETS[preset]:  # a learned variance, which the loss of a run does not have
        model["out_channels"] = 0
    return validate(
        {
            "name": "gpu",
            "data": {"resolution": side},
            "model": model,
            "diffusion": {"schedule": "edm_lognormal", "prediction": "F", "weighting": "edm"},
            "optim": {"lr": 1e-4},
            "train": {"images": 10**9, "global_batch": batch, "graph": graph, "trackers": []},
            "eval": {"n_generated": 0},
        }
    )


def report(cell: str, network: str, step: OurStep, call: Callable[[], Any], top: float, **more: Any) -> None:
    """Time a call that makes one step, and emit its row: MFU against NVIDIA's figure and the measured ceiling.

    top: FLOP/s of `ceiling`
    """
    seconds = seconds_of(call)
    on, kernels = busy(call)
    rate = step.flops / seconds
    emit(
        cell=cell,
        network=network,
        batch=step.images,
        ms=round(seconds * 1e3, 3),
        busy_ms=round(on * 1e3, 3),
        busy_share=round(on / seconds, 3),
        kernels=kernels,
        images_per_s=round(step.images / seconds, 1),
        tflop_per_s=round(rate / 1e12, 2),
        mfu_of_989=round(rate / H200_PEAK, 4),
        mfu_of_ceiling=round(rate / top, 4),
        **more,
    )
