"""Everything that needs one GPU, in at most nine minutes: `python -m benchmarks.throughput.gpu`.

Cells run one after the other, the most wanted first, each in a process of its own with a limit: one that hangs or
fails costs its own limit alone, and none begins after the deadline. Every row is written at once to gpu.jsonl of the
folder $OUT (the working directory without it). `--dry-run` makes each cell at toy sizes on the CPU.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Annotated, Any

import torch
import typer
from torch.backends import cudnn

from benchmarks.common.contenders import RACES
from benchmarks.common.gpu_timing import (
    DEVICE,
    ON_GPU,
    OurStep,
    busy,
    ceiling,
    emit,
    our_step,
    report,
    seconds_of,
)
from benchmarks.common.measure import race
from benchmarks.throughput.gpu_peers import diffusers_example, dit_loop, edm_loop
from diffscale.core.device import synchronize
from diffscale.diffusion import SOLVERS, CapturedDenoiser, Guidance, create_diffusion
from diffscale.evaluation import ModelSource, Sampling
from diffscale.evaluation.networks.fold_batch_norm import fold_batch_norms
from diffscale.evaluation.networks.inception import SIZE, Inception
from diffscale.kernels.runtime import allow_tf32, configure_process
from diffscale.models import PRESETS, create_model

MODULE = "benchmarks.throughput.gpu"
TINY = ("unet-tiny", "dit-mini", "rin-tiny", "uvit-tiny")
EVERY_BACKBONE = (*TINY, "jit-mini", "hdit-tiny", "edm2-tiny")
TOY = {"dit": "dit-mini", "jit": "jit-mini", "edm": "unet-tiny", "adm": "unet-tiny"}


def sized(preset: str, batch: int) -> tuple[str, int]:
    """Return the preset and batch on a GPU; elsewhere the small network of the same backbone and two images."""
    if ON_GPU:
        return preset, batch
    backbone = PRESETS[preset]["name"]
    return TOY.get(backbone, f"{backbone}-tiny"), 2


# ---- the cells


def probe() -> None:
    """What the machine can do: the ceiling of bf16 products, copies, and the cost of a launch."""
    x = torch.zeros(1 << (30 if ON_GPU else 20), dtype=torch.uint8, device=DEVICE)
    one, launches = torch.zeros(1, device=DEVICE), 1000
    row = {
        "tflop_per_s_ceiling": ceiling() / 1e12,
        "copy_tb_per_s": 2 * x.numel() / seconds_of(x.clone, 0.3) / 1e12,
        "us_per_eager_op": seconds_of(lambda: [one.add_(1) for _ in range(launches)], 0.3) / launches * 1e6,
    }
    if ON_GPU:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(launches):
                one.add_(1)
        row["us_per_graph_op"] = seconds_of(graph.replay, 0.3) / launches * 1e6
    emit(cell="probe", **{k: round(v, 3) for k, v in row.items()})


def small(name: str) -> None:
    """A tiny preset: waiting for each step, one ahead, captured; reads on the host; the same weights when captured."""
    top, (name, batch) = ceiling(), sized(name, 256)
    step = our_step(name, batch)
    report("small waiting", name, step, step.waiting, top)
    report("small ahead", name, step, step.ahead, top)
    if not ON_GPU:
        return
    synchronize(DEVICE)
    torch.cuda.set_sync_debug_mode("error")  # a read on the host raises
    try:
        step.ahead()
        reads = "none"
    except RuntimeError as error:
        reads = str(error).partition("\n")[0][:120]
    torch.cuda.set_sync_debug_mode("default")
    ends = []
    for graph in (False, True):
        other = our_step(name, batch, graph=graph)
        for _ in range(8):
            other.waiting()
        ends.append(other.weights())
    captured = our_step(name, batch, graph=True)
    same = bool(torch.equal(*ends))
    report("small captured", name, captured, captured.ahead, top, host_reads=reads, same_weights_as_eager=same)


def exactness() -> None:
    """Whether the same steps give the same weights, what that costs, and that no backbone needs what is refused."""
    top = ceiling()
    for name in EVERY_BACKBONE:
        try:
            our_step(*sized(name, 64)).waiting()
            refused = ""
        except RuntimeError as error:
            refused = str(error).partition("\n")[0][:200]
        emit(cell="exact refuses", network=name, refused=refused)
    for name, batch in (("dit-cifar10", 256), ("unet-cifar10", 256), ("uvit-cifar10", 256)):
        name, batch = sized(name, batch)
        for exact in (True, False):
            ends = []
            for _ in range(2):
                step = our_step(name, batch, exact=exact)
                for _ in range(5):
                    step.waiting()
                ends.append(step.weights())
            same = bool(torch.equal(*ends))
            report("exact" if exact else "fastest", name, step, step.ahead, top, same_weights_twice=same)


def large(name: str, batch: int) -> None:
    """A published network: eager, blocks compiled, and captured."""
    top, (name, batch) = ceiling(), sized(name, batch)
    step = our_step(name, batch, exact=False)
    report("large eager", name, step, step.ahead, top)
    del step
    for graph in (False, True) if ON_GPU else (False,):
        step = our_step(name, batch, exact=False, compiled=ON_GPU, graph=graph)
        started = time.perf_counter()
        step.waiting()
        first = round(time.perf_counter() - started, 1)
        report("large compiled" + " and captured" * graph, name, step, step.ahead, top, first_step_s=first)
        del step
    if ON_GPU:
        emit(cell="memory", network=name, batch=batch, gib=round(torch.cuda.max_memory_allocated() / 2**30, 1))


def convolutions(name: str, batch: int) -> None:
    """What deterministic algorithms, cuDNN's trials and the memory order are worth."""
    top, (name, batch) = ceiling(), sized(name, batch)
    for last in (True, False):
        step = our_step(name, batch, channels_last=last)
        for deterministic, trials in ((True, False), (False, False), (False, True)):
            cudnn.deterministic, cudnn.benchmark = deterministic, trials
            if last or deterministic:
                more = {"channels_last": last, "deterministic": deterministic, "benchmark": trials}
                report("convolutions", name, step, step.ahead, top, **more)
        del step


def neighbourhoods(name: str, batch: int) -> None:
    """HDiT's neighbourhood attention in plain torch and by FlexAttention, both compiled."""
    top, (name, batch) = ceiling(), sized(name, batch)
    for fused in (False, True):
        step = our_step(name, batch, exact=False, accelerated=fused, compiled=ON_GPU and fused)
        report(f"hdit {'fused' if fused else 'plain'}", name, step, step.ahead, top)
        del step


def peers() -> None:
    """Published loops in turns with ours: on the same network, or on diffusers' own of the same widths."""
    pairs = 15 if ON_GPU else 1
    entry = RACES["unet-cifar10" if ON_GPU else "unet-small"]
    batch = 128 if ON_GPU else 2
    wrapped: Any = entry.theirs().to(DEVICE)
    ours = our_step("ddpm-cifar10" if ON_GPU else "unet-tiny", batch, exact=False, graph=ON_GPU)
    versus("diffusers train_unconditional", ours, diffusers_example(wrapped.network, ours.batch.images), pairs)
    for peer, preset, size in (("DiT train.py", "dit-b-4", 256), ("EDM training_loop", "edm-cifar10-ddpmpp", 128)):
        preset, size = sized(preset, size)
        ours = our_step(preset, size, exact=False, compiled=ON_GPU, graph=ON_GPU)
        settings = {k: v for k, v in PRESETS[preset].items() if k != "out_channels"}
        network = create_model(settings.pop("name"), **settings).to(DEVICE).train()
        labels = ours.batch.labels if settings.get("num_classes") else None
        images = ours.batch.images.contiguous()
        loop = dit_loop if peer.startswith("DiT") else edm_loop
        versus(peer, ours, loop(network, images, labels), pairs)


def versus(peer: str, ours: OurStep, theirs: Callable[[], None], pairs: int) -> None:
    """Race our step against a peer's in turns of half a second, and emit the ratio with its interval."""
    count = max(1, round((0.5 if ON_GPU else 0.01) / seconds_of(theirs, 0.3)))

    def repeated(step: Callable[[], None]) -> Callable[[], None]:
        def call() -> None:
            for _ in range(count):
                step()
            synchronize(DEVICE)

        return call

    row = race(repeated(ours.ahead), repeated(theirs), count * ours.images, pairs)
    emit(cell="peer", peer=peer, batch=ours.images, **row)


def sampling(name: str, batch: int, steps: int) -> None:
    """Samples per second: eager and captured, without guidance and with it."""
    name, batch = sized(name, batch)
    model = create_model(name, num_classes=10).to(DEVICE).eval().requires_grad_(False)
    model.to(memory_format=torch.channels_last)
    diffusion = create_diffusion(prediction="F", schedule={"name": "edm_lognormal"}, weighting={"name": "edm"})
    for guidance in (Guidance(), Guidance(2.0)):
        for captured in (False, True):
            settings = Sampling(
                SOLVERS["dpmpp_2m"](steps=steps, grid="karras"),
                "dpmpp_2m",
                batch=batch,
                guidance=guidance,
                precision="bf16" if ON_GPU else "fp32",
            )
            source = ModelSource(model, diffusion, settings, (3, 32, 32), batch, (1,) * 10, str(DEVICE))
            source.denoiser = CapturedDenoiser()
            source.denoiser.failed = not captured

            def draw(source: ModelSource = source) -> None:
                source.images(0, batch)

            seconds = seconds_of(draw)
            on, kernels = busy(draw, 1)
            emit(
                cell="sampling",
                network=name,
                batch=batch,
                nfe=steps,
                guidance=guidance.scale,
                captured=bool(source.denoiser.graphs),
                images_per_s=round(batch / seconds, 1),
                busy_share=round(on / seconds, 3),
                kernels=kernels,
            )


def features() -> None:
    """Inception's images per second in three precisions, with random weights."""
    network = fold_batch_norms(Inception().eval().requires_grad_(False), torch.zeros(1, 3, SIZE, SIZE))
    network.to(DEVICE).to(memory_format=torch.channels_last)
    for batch in (128, 512) if ON_GPU else (2,):
        x = torch.rand(batch, 3, SIZE, SIZE, device=DEVICE).mul(255).contiguous(memory_format=torch.channels_last)
        for precision in ("fp32", "tf32", "bf16"):
            allow_tf32(precision == "tf32")
            low = precision == "bf16"
            with torch.inference_mode(), torch.autocast(DEVICE.type, torch.bfloat16, enabled=low):
                seconds = seconds_of(partial(network, x))
            emit(cell="features", batch=batch, precision=precision, images_per_s=round(batch / seconds, 1))


CELLS: dict[str, tuple[int, Callable[..., None], tuple[Any, ...]]] = {
    # name: (limit in seconds, function, arguments), the most wanted first
    "probe": (25, probe, ()),
    **{name: (35, small, (name,)) for name in TINY},
    "dit-xl-2": (70, large, ("dit-xl-2", 96)),
    "exact": (60, exactness, ()),
    "peers": (80, peers, ()),
    "sampling": (25, sampling, ("unet-tiny", 1000, 12)),
    "convolutions": (60, convolutions, ("edm-imagenet64-adm", 96)),
    "rin-imagenet64": (60, large, ("rin-imagenet64", 256)),
    "jit-b-16": (45, large, ("jit-b-16", 128)),
    "features": (30, features, ()),
    "edm2-imagenet64-s": (90, large, ("edm2-imagenet64-s", 96)),
    "hdit": (60, neighbourhoods, ("hdit-imagenet128", 64)),
    "edm-imagenet64-adm": (100, large, ("edm-imagenet64-adm", 96)),
}


def main(
    seconds: Annotated[float, typer.Option(help="after these none begins, and the one that runs is ended")] = 540,
    only: Annotated[str, typer.Option(help="cells whose names contain this")] = "",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="each cell at toy sizes on the CPU")] = False,
    cell: Annotated[str, typer.Option(help="run this cell here", hidden=True)] = "",
) -> None:
    """Run the cells."""
    if cell:
        _, function, arguments = CELLS[cell]
        configure_process(1, DEVICE)
        function(*arguments)
        return
    environment = os.environ | ({"CUDA_VISIBLE_DEVICES": ""} if dry_run else {})
    end, failed = time.monotonic() + seconds, []
    for name, (limit, _, _) in CELLS.items():
        left = end - time.monotonic()
        if only not in name or left < 15:
            continue
        started = time.monotonic()
        command = [sys.executable, "-m", MODULE, "--cell", name]
        limit = limit if not dry_run else max(limit, 120)
        try:
            ended: int | str = subprocess.run(command, timeout=min(limit, left), env=environment).returncode
        except subprocess.TimeoutExpired:
            ended = "limit"
        failed += [name] if ended else []
        emit(cell=f"({name})", ended=ended, seconds=round(time.monotonic() - started, 1))
    if failed:
        print(f"not complete: {', '.join(failed)}", file=sys.stderr)
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
