"""`python -m benchmarks.reliability.soak [--minutes 30]`: train, evaluate and tune in a loop.

All rounds use one Ray; no memory and no handles may grow.

After each round the anonymous memory and the open files of this process and of Ray's own long-lived processes are
written to benchmarks/results/soak.csv. Flat: over the second half of the rounds the fitted growth is below 1 MB and
below one file handle for each round, in every process.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Annotated

import numpy as np
import psutil
import typer

from benchmarks.common.machine import made_by
from benchmarks.common.measure import write_csv

RESULTS = Path(__file__).parents[1] / "results" / "soak.csv"
WARMUP = 0.5  # share of the rounds that is left out: caches and thread pools fill
MEGABYTES, HANDLES = 1.0, 1.0  # growth per round that is still flat
LONG_LIVED = ("gcs_server", "raylet", "log_monitor", "monitor.py")
SMALL = [
    "data.resolution=16",
    "model.model_channels=16",
    "model.channel_mult=[1,2]",
    "model.num_blocks=1",
    "model.attn_resolutions=[]",
    "model.middle_attention=false",
    "optim.warmup_images=0",
    "train.global_batch=16",
    "train.images=320",
    "train.flops=null",
    "train.workers=1",
    "train.trackers=[]",
    "train.compile=false",
    "train.channels_last=false",
    "eval.n_generated=32",
    "eval.points=[1.0]",
    "eval.grid_images=0",
]


def anonymous_megabytes(pid: int) -> float:
    """RssAnon: memory that is the process's own, without files that it has mapped."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) / 1024
    return 0.0


def watched() -> dict[str, psutil.Process]:
    """This process and Ray's long-lived ones that it started."""
    me = psutil.Process()
    found = {"driver": me}
    for child in me.children(recursive=True):
        with suppress(psutil.NoSuchProcess):  # it ended, or nobody has waited for it yet
            title = " ".join(child.cmdline()) or child.name()
            for name in LONG_LIVED:
                if name in title.split(" -")[0]:
                    found.setdefault(name, child)
    return found


def one_round(number: int, storage: Path) -> None:
    """A run from its beginning, its evaluation with another sampler, and a sweep of two trials."""
    from diffscale.config.load import load_experiment  # import cost
    from diffscale.sweep.ledger import Ledger  # import cost
    from diffscale.sweep.run import load_sweep  # import cost
    from diffscale.sweep.run import run as run_sweep  # import cost
    from diffscale.training.evaluate_runs import EvaluateOptions, evaluate_run  # import cost
    from diffscale.training.run import train  # import cost

    settings = [f"storage={storage}", *SMALL, f"train.seed={number}"]
    result = train(load_experiment("quickstart-unet", [*settings, "name=soak"]), show=False)
    assert result.finished, result
    evaluate_run(result.run_folder, ["eval.n_generated=32"], EvaluateOptions(solvers=("heun,steps=4",)))
    sweep = load_sweep(
        "quickstart", [*settings, "budget.trial.flops=null", "budget.trial.images=160", "name=soak-sweep"]
    )
    assert not run_sweep(Ledger(sweep)).failed


def growth(values: list[float]) -> float:
    """Fitted growth per round over the rounds after the warm-up."""
    tail = values[int(len(values) * WARMUP) :]
    return float(np.polyfit(np.arange(len(tail)), tail, 1)[0]) if len(tail) > 2 else float("nan")


def main(minutes: Annotated[float, typer.Option(help="for how long")] = 30.0) -> None:
    """Exit code 1 when something grew."""
    from diffscale.distributed.connect import connect  # import cost

    storage = Path(tempfile.mkdtemp(prefix="dss-", dir="/tmp"))
    connect(num_cpus=3)
    rows: list[dict[str, float | str]] = []
    end, number = time.monotonic() + 60 * minutes, 0
    try:
        while time.monotonic() < end:
            begun = time.monotonic()
            one_round(number, storage)
            for name, process in watched().items():
                memory, handles = anonymous_megabytes(process.pid), float(process.num_fds())
                rows.append(
                    {
                        "round": number,
                        "seconds": round(time.monotonic() - begun, 1),
                        "process": name,
                        "anonymous_megabytes": round(memory, 2),
                        "handles": handles,
                    }
                )
            print(
                {r["process"]: (r["anonymous_megabytes"], r["handles"]) for r in rows if r["round"] == number},
                flush=True,
            )
            number += 1
            for folder in (storage / "runs").iterdir():  # the disk is not what is tested
                shutil.rmtree(folder)
            write(rows)
    finally:
        shutil.rmtree(storage, ignore_errors=True)
    grew = False
    for name in sorted({str(r["process"]) for r in rows}):
        mine = [r for r in rows if r["process"] == name]
        memory = growth([float(r["anonymous_megabytes"]) for r in mine])
        handles = growth([float(r["handles"]) for r in mine])
        flat = memory < MEGABYTES and handles < HANDLES
        grew |= not flat
        print(f"{name}: {memory:+.2f} MB, {handles:+.2f} handles for each round: {'flat' if flat else 'GREW'}")
    print(f"{number} rounds in {minutes:.0f} minutes")
    raise SystemExit(int(grew))


def write(rows: list[dict[str, float | str]]) -> None:
    """Write the table with what made it."""
    made = made_by()
    write_csv(RESULTS, [row | made for row in rows])


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    typer.run(main)
