"""`python -m benchmarks.faults [NAME ...]`: what each fault costs a run and a sweep, on Ray nodes in namespaces.

Each fault is done to a real training run on its own cluster: a head without CPUs, and worker nodes with one CPU each.
A row says how long no step was made (recovery), how many images were trained again (lost work), and whether the final
weights are those of the calm run. Rows go to benchmarks/results/faults.csv; a fault measured again replaces its row.
"""

from __future__ import annotations

import csv
import json
import os
import platform
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer

from benchmarks.namespaces import Network, network, unavailable, wait_for
from diffscale.provenance import source

RESULTS = Path(__file__).parent / "results" / "faults.csv"
BATCH, STEPS, CHECKPOINT_STEPS = 16, 240, 20
FAULT_AT = 70  # steps: the run is in full swing
LIMIT = 420.0  # seconds for one run with its fault
WORKER = "RayTrainWorker"  # in the title of a training process

SMALL = [
    "data.resolution=16", "model.model_channels=16", "model.channel_mult=[1,2]", "model.num_blocks=1",
    "model.attn_resolutions=[]", "model.middle_attention=false", "optim.warmup_images=0", "eval.n_generated=0",
    f"train.global_batch={BATCH}", f"train.images={BATCH * STEPS}", "train.flops=null", "train.precision=fp32",
    f"train.log_every_images={BATCH}", f"train.checkpoint.every_images={BATCH * CHECKPOINT_STEPS}",
    "train.compile=false", "train.channels_last=false", "optim.lr=2e-4", "train.trackers=[]",
]  # fmt: skip


@dataclass(frozen=True)
class Row:
    fault: str
    program: str  # train or sweep
    workers: str  # before the fault, and after where that changes
    recovery_seconds: float  # from the fault to the next step
    lost_images: int  # trained again
    checkpoint_every_images: int
    images: int  # of the whole run
    outcome: str  # weights identical, or how the loss compares
    seconds: float  # of the whole run, with the fault
    machine: str
    commit: str
    date: str


class Run:
    """A training run as a process on the head node, watched through its metrics.jsonl."""

    def __init__(self, net: Network, storage: Path, name: str, *settings: str) -> None:
        self.net, self.storage, self.name = net, storage, name
        self.log = net.folder / f"{name}.log"
        self.settings = [f"storage={storage}", f"name={name}", *SMALL, *settings]
        self.started = time.time()
        self.launch()

    def launch(self) -> None:
        command = [sys.executable, "-m", "diffscale.train", "quickstart-unet", *self.settings]
        self.process = self.net.head.popen(*command, log=self.log)

    @property
    def folder(self) -> Path:
        return self.place(self.storage, self.name)

    @staticmethod
    def place(storage: Path, name: str) -> Path:
        """The run's folder; its name ends with the run's hash of 16 digits."""
        found = sorted((storage / "runs").glob(f"{name}-{'[0-9a-f]' * 16}"))
        return found[0] if found else storage / "runs" / name

    def history(self) -> list[tuple[int, float]]:
        """(images seen, time) of each step that is in the history."""
        try:
            lines = (self.folder / "metrics.jsonl").read_text().splitlines()
        except OSError:
            return []
        rows = []
        for line in lines:
            try:
                row = json.loads(line)
                rows.append((int(row["images_seen"]), float(row["time"])))
            except (ValueError, KeyError):
                continue
        return rows

    def images(self) -> int:
        return self.history()[-1][0] if self.history() else 0

    def wait_for_step(self, step: int) -> None:
        def reached() -> bool:
            if self.process.poll() is not None:
                raise RuntimeError(f"the run ended early:\n{self.log.read_text()[-3000:]}")
            return self.images() >= step * BATCH

        wait_for(reached, LIMIT, f"step {step}", every=0.1)

    def finish(self) -> None:
        code = self.process.wait(LIMIT)
        if code:
            raise RuntimeError(f"exit code {code}:\n{self.log.read_text()[-3000:]}")

    def weights(self) -> bytes:
        """The final weights."""
        last = sorted((self.folder / "checkpoints").glob("images-*"))[-1]
        assert last.name == f"images-{BATCH * STEPS:09d}", last
        return (last / "model.safetensors").read_bytes()

    def losses(self) -> dict[int, float]:
        lines = (self.folder / "metrics.jsonl").read_text().splitlines()
        return {row["images_seen"]: row["loss"] for row in map(json.loads, lines)}


@dataclass(frozen=True)
class Fault:
    """`do` harms the cluster while the run is going on and may wait in between; the clock starts before it."""

    name: str
    do: Callable[[Network, Run], None]
    worker_nodes: int = 3  # one more than the run needs
    workers: str = "2"
    elastic: bool = False


def kill_worker(net: Network, run: Run) -> None:
    victim = next(n for n in net.nodes[1:] if n.find(WORKER))
    os.kill(victim.find(WORKER)[0], signal.SIGKILL)


def kill_node(net: Network, run: Run) -> None:
    next(n for n in net.nodes[1:] if n.find(WORKER)).kill()


def node_comes_back(net: Network, run: Run) -> None:
    victim = next(n for n in net.nodes[1:] if n.find(WORKER))
    victim.kill()
    time.sleep(5)
    victim.start()


def cut(seconds: float) -> Callable[[Network, Run], None]:
    def do(net: Network, run: Run) -> None:
        victim = next(n for n in net.nodes[1:] if n.find(WORKER))
        victim.unplug()
        time.sleep(seconds)
        victim.plug()

    return do


def slow_node(net: Network, run: Run) -> None:
    victim = next(n for n in net.nodes[1:] if n.find(WORKER))
    victim.slow("4mbit")
    time.sleep(20)
    victim.fast()


def restart_cluster(net: Network, run: Run) -> None:
    """The head dies, and with it the driver; the nodes are started again and the same command is given again."""
    net.head.kill()
    run.process.wait(60)
    time.sleep(1)
    for node in net.nodes[1:]:
        node.kill()
    net.start()
    run.launch()


FAULTS = [
    Fault("worker killed", kill_worker),
    Fault("node killed, a spare one takes over", kill_node),
    Fault("node killed, elastic run goes on with fewer", kill_node, worker_nodes=2, workers="[1,2]", elastic=True),
    Fault("node killed and back after 5 s", node_comes_back, worker_nodes=2),
    Fault("link cut for 5 s", cut(5)),
    Fault("link cut for 60 s", cut(60)),
    Fault("slow node (4 Mbit/s for 20 s)", slow_node),
    Fault("head killed, cluster restarted, command repeated", restart_cluster),
]


def measure(fault: Fault, storage: Path, calm: Run | None) -> Row:
    """One run with its fault. Raises RuntimeError when the run does not survive."""
    with network(1 + fault.worker_nodes, cpus=[0] + [1] * fault.worker_nodes) as net:
        name = "".join(c if c.isalnum() else "-" for c in fault.name).strip("-")[:40]
        shutil.rmtree(Run.place(storage, name), ignore_errors=True)
        run = Run(net, storage, name, f"train.workers={fault.workers}")
        run.wait_for_step(FAULT_AT)
        before = run.images()
        at = time.time()
        fault.do(net, run)
        run.finish()
        gap, first = longest_gap(run.history(), at)
        lost = max(before - first + BATCH, 0)
        return Row(
            fault=fault.name, program="train", workers=fault.workers, recovery_seconds=round(gap, 1), lost_images=lost,
            checkpoint_every_images=BATCH * CHECKPOINT_STEPS, images=BATCH * STEPS, outcome=compare(run, calm),
            seconds=round(time.time() - run.started, 1), machine=f"{os.cpu_count()} CPU cores, {platform.machine()}",
            commit=source().commit[:12], date=datetime.now(UTC).strftime("%Y-%m-%d"),
        )  # fmt: skip


def longest_gap(history: list[tuple[int, float]], at: float) -> tuple[float, int]:
    """(seconds from the fault to the first step after the longest pause that follows it, images seen at that step)."""
    times = [(images, t) for images, t in history if t >= at]
    if not times:
        raise RuntimeError("no step after the fault")
    pauses, previous = [], at
    for images, t in times:
        pauses.append((t - previous, t - at, images))
        previous = t
    _, since, images = max(pauses)
    return since, images


def compare(run: Run, calm: Run | None) -> str:
    if calm is None or run is calm:
        return "reference"
    if run.weights() == calm.weights():
        return "weights identical to the calm run"
    ours, theirs = run.losses(), calm.losses()
    common = sorted(set(ours) & set(theirs))
    worst = max(abs(ours[i] - theirs[i]) / max(abs(theirs[i]), 1e-12) for i in common)
    return f"loss within {worst:.1e} of the calm run, relative, at every step"


def save(row: Row) -> None:
    RESULTS.parent.mkdir(exist_ok=True)
    rows: dict[tuple[str, str], dict[str, str]] = {}
    if RESULTS.exists():
        with open(RESULTS, newline="") as file:
            rows = {(r["fault"], r["program"]): r for r in csv.DictReader(file)}
    rows[row.fault, row.program] = {k: str(v) for k, v in asdict(row).items()}
    with open(RESULTS, "w", newline="") as file:
        writer = csv.DictWriter(file, [f.name for f in fields(Row)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows.values())


def calm_run(storage: Path) -> Run:
    with network(3, cpus=[0, 1, 1]) as net:
        run = Run(net, storage, "calm", "train.workers=2")
        run.finish()
        return run


def main(
    names: Annotated[list[str] | None, typer.Argument(help="parts of the names of faults; default all")] = None,
) -> None:
    """Do each fault to a run and write what it cost."""
    if reason := unavailable():
        raise SystemExit(f"not measured: {reason}")
    chosen = [f for f in FAULTS if not names or any(n in f.name for n in names)]
    storage = Path(tempfile.mkdtemp(prefix="dsf-", dir="/tmp"))
    try:
        calm = calm_run(storage)
        print(f"calm run: {time.time() - calm.started:.0f} s", flush=True)
        for fault in chosen:
            row = measure(fault, storage, calm)
            save(row)
            print(f"{row.fault}: {row.recovery_seconds} s, {row.lost_images} images again, {row.outcome}", flush=True)
    finally:
        shutil.rmtree(storage, ignore_errors=True)


if __name__ == "__main__":
    typer.run(main)
