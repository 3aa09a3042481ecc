"""Training steps per second against peers, side by side: `python -m benchmarks.throughput.training_step unet-small`.

Two processes on one machine, ours and the peer's, take turns: forward, backward and optimizer on a batch of the same
shape with the same AdamW. Ours runs as a run would choose by itself (diffscale.training.numerics); the
peer runs in the best of {fp32, bf16} × {eager, compile} × {contiguous, channels-last}, measured first: bf16 only where
the processor has it (emulated it is ten times slower), compiled in the precision that is faster eager. The ratio of
achieved FLOP/s is the median over the pairs with a bootstrap 95 % interval. Rows go to
benchmarks/results/throughput/training_step.csv.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
import torch
import torch.multiprocessing as multiprocessing
import typer

from benchmarks.common.contenders import RACES, training_flops
from benchmarks.common.machine import cpu_name, made_by
from benchmarks.common.measure import interval, read_csv, write_csv
from benchmarks.common.stepper import Automatic, Stepper
from diffscale.core.device import matmul_rate
from diffscale.kernels.runtime import keep_freed_memory
from diffscale.training.numerics import Numerics, multiplies_bf16

RESULTS = Path(__file__).parents[1] / "results" / "throughput" / "training_step.csv"
_PRECISIONS: tuple[Literal["bf16", "fp32"], ...] = ("bf16", "fp32")
MODES = [
    Numerics(p, last, compiled) for p, last, compiled in itertools.product(_PRECISIONS, (False, True), (False, True))
]
_COMPARED = {None: "each its best", True: "both compiled", False: "both eager"}


class Setup(NamedTuple):
    """Where and how both contenders run."""

    device: str  # cpu or cuda
    threads: int  # of each process
    clock: Literal["wall", "cpu"]
    compiled: bool | None  # one setting for both; None: each its best


def worker(pipe: Any, race: str, side: str, setup: Setup, mode: Numerics | None) -> None:
    """Answer each number n on the pipe with the seconds of n steps; first send the numerics and the matmul ceiling."""
    torch.set_num_threads(setup.threads)
    if side == "ours" and setup.device == "cpu":
        keep_freed_memory()  # as a run does
    if setup.device == "cuda":
        torch.backends.cudnn.benchmark = True
    entry, asked = RACES[race], Automatic(compile="auto" if setup.compiled is None else setup.compiled)
    build = entry.ours if side == "ours" else entry.theirs
    stepper = Stepper(build, entry.side, entry.batch, setup.device, mode, asked, setup.clock)
    first = stepper.seconds(1)
    stepper.seconds(1)
    idle = setup.clock == "wall"  # the ceiling is a matter of wall time: on a busy machine there is none to speak of
    ceiling = matmul_rate(torch.device(setup.device), stepper.numerics.precision) if idle else float("nan")
    pipe.send((stepper.numerics, first, ceiling))
    while (steps := pipe.recv()) is not None:
        pipe.send(stepper.seconds(steps))


class Contender:
    """A worker process that sleeps until a step is requested."""

    def __init__(self, race: str, side: str, setup: Setup, mode: Numerics | None) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=worker, args=(theirs, race, side, setup, mode), daemon=True)
        self.process.start()
        theirs.close()
        self.numerics, self.first, self.ceiling = self.pipe.recv()

    def seconds(self, steps: int) -> float:
        self.pipe.send(steps)
        return self.pipe.recv()

    def close(self) -> None:
        self.pipe.send(None)
        self.process.join()


def modes_on(device: str, compiled: bool) -> list[Numerics]:
    """Modes worth trying: bf16 where it is not emulated, compiled ones if requested."""
    emulated = not multiplies_bf16(device)
    return [m for m in MODES if (compiled or not m.compile) and not (emulated and m.precision == "bf16")]


def fastest(modes: list[Numerics], seconds: Callable[[Numerics], float]) -> Numerics:
    """The mode of least seconds: the eager ones are tried, then the compiled ones in the precision of the best of them.

    Compiling takes minutes for each mode and makes the products of neither precision faster.
    """
    found = {mode: seconds(mode) for mode in modes if not mode.compile}
    precision = min(found, key=found.__getitem__).precision if found else None
    found |= {mode: seconds(mode) for mode in modes if mode.compile and precision in (None, mode.precision)}
    return min(found, key=found.__getitem__)


def best_mode(race: str, setup: Setup, modes: list[Numerics]) -> Numerics:
    """The peer's fastest mode: median of five steps, each mode in a process of its own."""

    def seconds(mode: Numerics) -> float:
        contender = Contender(race, "peer", setup, mode)
        taken = statistics.median(contender.seconds(1) for _ in range(5))
        contender.close()
        typer.echo(f"  peer {mode.precision} compile={mode.compile} channels_last={mode.channels_last}: {taken:.3f} s")
        return taken

    return fastest(modes, seconds)


def run_race(race: str, setup: Setup, pairs: int, mode: Numerics, ours: Numerics | None = None) -> list[dict]:
    """Alternate `pairs` times and return the two rows, ours with the ratio."""
    entry, sides = RACES[race], ("ours", "peer")
    contenders = {"ours": Contender(race, "ours", setup, ours), "peer": Contender(race, "peer", setup, mode)}
    counts = {"ours": training_flops(entry.ours, entry.side), "peer": training_flops(entry.theirs, entry.side)}
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    for pair in range(pairs):
        for side in sides if pair % 2 else reversed(sides):
            seconds[side].append(contenders[side].seconds(1))
    rates = {side: entry.batch * counts[side][1] / np.array(seconds[side]) for side in sides}
    ratios = rates["ours"] / rates["peer"]
    low, high = interval(ratios)
    rows = []
    for side in sides:
        contender = contenders[side]
        row: dict[str, Any] = {"race": race, "side": side, "network": "diffscale" if side == "ours" else entry.peer}
        row |= {"device": torch.cuda.get_device_name() if setup.device == "cuda" else f"{cpu_name()} × {setup.threads}"}
        row |= {"compared": _COMPARED[setup.compiled], "clock": setup.clock}
        row |= {"torch": torch.__version__, "batch": entry.batch, "pairs": pairs, "parameters": counts[side][0]}
        row |= {"train_flops_per_image": f"{counts[side][1]:.6g}", "precision": contender.numerics.precision}
        row |= {"compile": contender.numerics.compile, "channels_last": contender.numerics.channels_last}
        row |= {"winograd": contender.numerics.winograd}
        spread = np.percentile(entry.batch / np.array(seconds[side]), (25, 50, 75))
        row |= {"images_per_s": f"{spread[1]:.4g}", "images_per_s_q1": f"{spread[0]:.4g}"}
        row |= {"images_per_s_q3": f"{spread[2]:.4g}", "flop_per_s": f"{np.median(rates[side]):.4g}"}
        row |= {
            "matmul_ceiling": f"{contender.ceiling:.4g}",
            "mfu": f"{np.median(rates[side]) / contender.ceiling:.3f}",
        }
        row |= {"first_step_s": f"{contender.first:.2f}"}
        mine = side == "ours"
        row |= {"ratio": f"{np.median(ratios):.3f}" if mine else "", "ratio_low": f"{low:.3f}" if mine else ""}
        row |= {"ratio_high": f"{high:.3f}" if mine else ""}
        rows.append(row | made_by())
        contender.close()
    return rows


def write(rows: list[dict], path: Path) -> None:
    """Add the rows to the CSV in the place of older ones of the same race, device and way of comparing."""

    def key(row: dict) -> tuple[str, ...]:
        return tuple(str(row[k]) for k in ("race", "device", "compared"))

    kept = [row for row in read_csv(path) if key(row) not in {key(r) for r in rows}]
    write_csv(path, sorted(kept + rows, key=lambda row: (row["race"], row["device"], row["side"])))


def main(
    races: Annotated[list[str], typer.Argument(help="names in contenders.RACES")],
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
    threads: Annotated[int, typer.Option(help="CPU threads of each process")] = torch.get_num_threads(),
    pairs: Annotated[int, typer.Option(help="alternating pairs of steps")] = 21,
    clock: Annotated[str, typer.Option(help="wall, or cpu where the machine is busy (one thread)")] = "wall",
    peer_mode: Annotated[str, typer.Option(help="precision,channels_last,compile found before, as bf16,0,1")] = "",
    our_mode: Annotated[str, typer.Option(help="likewise, in place of the automatic choice")] = "",
    peer_compile: Annotated[bool, typer.Option(help="also try torch.compile on the peer")] = True,
    compiled: Annotated[bool | None, typer.Option("--compile/--eager", help="one setting for both")] = None,
    out: Annotated[Path, typer.Option(help="CSV to add to")] = RESULTS,
) -> None:
    """Race our networks against their peers and write what was measured."""
    if clock not in ("wall", "cpu") or (clock == "cpu" and (device != "cpu" or threads != 1)):
        raise typer.BadParameter(f"clock = {clock}: expected wall, or cpu with --device cpu --threads 1")
    setup = Setup(device, threads, "cpu" if clock == "cpu" else "wall", compiled)
    for race in races:
        if race not in RACES:
            raise typer.BadParameter(f"{race}: expected one of {', '.join(RACES)}")
        modes = [m for m in modes_on(device, peer_compile) if compiled in (None, m.compile)]
        modes = [parse(peer_mode)] if peer_mode else modes
        mode = modes[0] if len(modes) == 1 else best_mode(race, setup, modes)
        rows = run_race(race, setup, pairs, mode, parse(our_mode) if our_mode else None)
        write(rows, out)
        for row in rows:
            typer.echo(
                {
                    k: row[k]
                    for k in ("side", "precision", "compile", "channels_last", "winograd", "images_per_s", "mfu")
                }
            )
        typer.echo(f"{race}: {rows[0]['ratio']} × [{rows[0]['ratio_low']}, {rows[0]['ratio_high']}]")


def parse(mode: str) -> Numerics:
    """bf16,1,0 → Numerics("bf16", channels_last=True, compile=False); a fourth number is winograd."""
    precision, *flags = mode.split(",")
    if precision not in ("bf16", "fp32") or len(flags) not in (2, 3) or set(flags) - {"0", "1"}:
        raise typer.BadParameter(
            f"{mode}: expected bf16 or fp32, then 0 or 1 for channels_last, for compile and, if wanted, for winograd"
        )
    channels_last, compiled, winograd = (flag == "1" for flag in (*flags, "0")[:3])
    return Numerics("bf16" if precision == "bf16" else "fp32", channels_last, compiled, winograd)


if __name__ == "__main__":
    typer.run(main)
