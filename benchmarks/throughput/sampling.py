"""DDIM sampling against diffusers' DDIMPipeline: `python -m benchmarks.throughput.sampling`.

Networks of equal widths, depths and attention places (benchmarks/common/contenders.py), the same steps and batch,
pixels out on both sides. Each side runs in the best of its own {fp32, bf16} × {contiguous, channels-last}, the peer
also compiled in its best one; which was measured first, on this machine.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from typing import Annotated, Any

import torch
import typer
from diffusers import DDIMPipeline, DDIMScheduler
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.common.contenders import RACES
from benchmarks.common.measure import race, write
from diffscale.diffusion import SOLVERS, create_diffusion
from diffscale.evaluation import ModelSource, Sampling
from diffscale.training.numerics import Numerics, multiplies_bf16

Mode = tuple[str, bool]


def modes() -> list[Mode]:
    """bf16 only where the processor has it."""
    precisions = ["fp32", "bf16"] if multiplies_bf16("cpu") else ["fp32"]
    return list(itertools.product(precisions, (False, True)))


def set_numerics(network: Any, channels_last: bool) -> None:
    """Prepare the network as a run would.

    Our network then uses Winograd's convolutions where they apply: float32, channels-last.
    """
    Numerics(channels_last=channels_last, winograd=channels_last).prepare(network)


def _inner(wrapped: Any) -> Any:
    """The network without the wrapper that gives both sides one call."""
    return wrapped.network.eval()


def ours(name: str, steps: int, batch: int) -> tuple[Any, Callable[[Mode], Any]]:
    entry = RACES[name]
    network: Any = _inner(entry.ours())
    diffusion = create_diffusion(
        schedule={"name": "ddpm_linear"},
        interpolant="vp",
        prediction="eps",
        weighting={"name": "uniform_eps"},
        resolution=entry.side,
    )

    def run(mode: Mode) -> None:
        sampling = Sampling(SOLVERS["ddim"](steps=steps), "ddim", batch=batch, precision=mode[0])
        ModelSource(network, diffusion, sampling, (3, entry.side, entry.side), batch).images(0, batch)

    return network, run


def theirs(name: str, steps: int, batch: int) -> tuple[Any, Callable[[Mode], Any]]:
    network: Any = _inner(RACES[name].theirs())
    pipeline: Any = DDIMPipeline(network, DDIMScheduler(num_train_timesteps=1000))
    pipeline.set_progress_bar_config(disable=True)

    def run(mode: Mode) -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=mode[0] == "bf16"):
            pipeline(batch_size=batch, num_inference_steps=steps, output_type="np")

    return network, run


def forward_flops(network: Any, side: int) -> float:
    """Count the FLOPs of one image without fused attention."""
    with torch.no_grad(), torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        with FlopCounterMode(display=False) as counter:
            network(torch.zeros(1, 3, side, side), torch.zeros(1))
        return float(counter.get_total_flops())


def best(network: Any, run: Callable[[Mode], Any]) -> Mode:
    seconds = {}
    for mode in modes():
        set_numerics(network, mode[1])
        run(mode)
        times = []
        for _ in range(2):
            started = time.perf_counter()
            run(mode)
            times.append(time.perf_counter() - started)
        seconds[mode] = min(times)
    chosen = min(seconds, key=lambda m: seconds[m])
    set_numerics(network, chosen[1])
    print({str(m): round(s, 3) for m, s in seconds.items()})
    return chosen


def main(
    name: Annotated[str, typer.Argument(help="race of contenders.py with a diffusers network")] = "unet-small",
    steps: Annotated[int, typer.Option(help="DDIM steps")] = 10,
    pairs: Annotated[int, typer.Option(help="alternating pairs")] = 15,
    compiled: Annotated[bool, typer.Option(help="try torch.compile for the peer")] = True,
) -> None:
    torch.set_num_threads(2)
    batch, side = RACES[name].batch, RACES[name].side
    our_network, our_run = ours(name, steps, batch)
    their_network, their_run = theirs(name, steps, batch)
    flops = forward_flops(our_network, side), forward_flops(their_network, side)  # of direct convolutions
    our_mode, their_mode = best(our_network, our_run), best(their_network, their_run)
    is_compiled = False
    if compiled:
        started = time.perf_counter()
        their_run(their_mode)
        eager = time.perf_counter() - started
        their_network.compile()
        their_run(their_mode)
        started = time.perf_counter()
        their_run(their_mode)
        is_compiled = time.perf_counter() - started < eager
        if not is_compiled:
            their_network._compiled_call_impl = None
    row = {
        "race": name,
        "steps": steps,
        "batch": batch,
        "our_flops": flops[0],
        "their_flops": flops[1],
        "our_mode": str(our_mode),
        "their_mode": str(their_mode),
        "theirs_compiled": is_compiled,
    }
    row |= race(lambda: our_run(our_mode), lambda: their_run(their_mode), batch, pairs, f"sampling-{name}")
    print(row, write("sampling", [row]))


if __name__ == "__main__":
    typer.run(main)
