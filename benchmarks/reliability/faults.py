"""`python -m benchmarks.reliability.faults [NAME ...]`: what each fault costs a run and a sweep.

Ray nodes run in network namespaces.

Each fault is done to a real training run on its own cluster: a head without CPUs, and worker nodes with one CPU each.
A row says how long no step was made (recovery), how many images were trained again (lost work), and whether the final
weights are those of the calm run. Rows go to benchmarks/results/faults.csv; a fault measured again replaces its row.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml

from benchmarks.common.machine import made_by
from benchmarks.common.measure import read_csv, wait_for, write_csv
from benchmarks.reliability.namespaces import Network, Node, network, unavailable

RESULTS = Path(__file__).parents[1] / "results" / "faults.csv"
BATCH, STEPS, CHECKPOINT_STEPS = 16, 240, 20
FAULT_AT = 70  # steps: the run is in full swing
LIMIT = 420.0  # seconds for one run with its fault
WORKER = {"train": "RayTrainWorker", "sweep": "ImplicitFunc"}  # in the title of a training process

SMALL = [
    "data.resolution=16",
    "model.model_channels=16",
    "model.channel_mult=[1,2]",
    "model.num_blocks=1",
    "model.attn_resolutions=[]",
    "model.middle_attention=false",
    "optim.warmup_images=0",
    "eval.n_generated=0",
    f"train.global_batch={BATCH}",
    f"train.images={BATCH * STEPS}",
    "train.flops=null",
    "train.precision=fp32",
    f"train.log_every_images={BATCH}",
    f"train.checkpoint.every_images={BATCH * CHECKPOINT_STEPS}",
    "train.compile=false",
    "train.channels_last=false",
    "optim.lr=2e-4",
    "train.trackers=[]",
]
SWEEP = ["train.workers=1", "eval.n_generated=16", "eval.points=[1.0]", "eval.grid_images=0"]


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
    load: float  # of the machine over five minutes; more than its cores means that others worked on it too


class Runs:
    """Files that a program has written into the storage, seen through metrics.jsonl and the checkpoints."""

    def __init__(self, storage: Path, name: str) -> None:
        self.storage, self.name = storage, name

    def folders(self) -> dict[str, Path]:
        """run_id -> folder of each run."""
        return {path.name[-16:]: path for path in run_folders(self.storage, self.name)}

    def steps(self) -> dict[str, list[tuple[int, float]]]:
        """run_id -> (images seen, time) of each step that is in its history."""
        return {
            run_id: [(r["images_seen"], r["time"]) for r in rows(folder)] for run_id, folder in self.folders().items()
        }

    def images(self) -> dict[str, int]:
        return {run_id: steps[-1][0] for run_id, steps in self.steps().items() if steps}

    def weights(self) -> dict[str, bytes]:
        """run_id -> the file of the final weights."""
        last = f"checkpoints/images-{BATCH * STEPS:09d}/model.safetensors"
        return {run_id: (folder / last).read_bytes() for run_id, folder in self.folders().items()}

    def losses(self) -> dict[tuple[str, int], float]:
        return {(i, row["images_seen"]): row["loss"] for i, folder in self.folders().items() for row in rows(folder)}


class Program(Runs):
    """`diffscale.train` or `diffscale.tune` as a process on the head node."""

    def __init__(self, net: Network, storage: Path, name: str, kind: str, workers: str = "2") -> None:
        super().__init__(storage, name)
        self.net, self.kind = net, kind
        self.log = net.folder / f"{name}.log"
        settings = [f"storage={storage}", *SMALL]
        if kind == "train":
            self.command = ["quickstart-unet", *settings, f"name={name}", f"train.workers={workers}"]
        else:
            file = net.folder / f"{name}.yaml"
            overrides = dict(item.split("=", 1) for item in [*settings, *SWEEP])
            sweep = {
                "name": name,
                "base": "quickstart-unet",
                "space": {"optim.lr": [1e-4, 2e-4]},
                "max_concurrent": 2,
                "overrides": {key: yaml.safe_load(value) for key, value in overrides.items()},
                "budget": {"trial": {"images": BATCH * STEPS}},
            }
            file.write_text(yaml.safe_dump(sweep))
            self.command = [str(file)]
        self.started = time.time()
        self.launch()

    def launch(self) -> None:
        module = "diffscale.train" if self.kind == "train" else "diffscale.tune"
        self.process = self.net.head.popen(sys.executable, "-m", module, *self.command, log=self.log)

    def wait_for_step(self, step: int) -> None:
        """Wait until every run has come so far."""

        def reached() -> bool:
            if self.process.poll() is not None:
                raise RuntimeError(f"the program ended early:\n{self.log.read_text()[-3000:]}")
            images = self.images()
            return len(images) == (1 if self.kind == "train" else 2) and min(images.values()) >= step * BATCH

        wait_for(reached, LIMIT, f"step {step}", every=0.1)

    def finish(self) -> None:
        code = self.process.wait(LIMIT)
        if code:
            raise RuntimeError(f"exit code {code}:\n{self.log.read_text()[-3000:]}")


def run_folders(storage: Path, name: str) -> list[Path]:
    """A run's folder ends with its hash of 16 digits."""
    return sorted((storage / "runs").glob(f"{name}-{'[0-9a-f]' * 16}"))


def rows(folder: Path) -> list[dict[str, Any]]:
    """Whole lines of metrics.jsonl."""
    out = []
    with contextlib.suppress(OSError):
        for line in (folder / "metrics.jsonl").read_text().splitlines():
            with contextlib.suppress(ValueError):
                out.append(json.loads(line))
    return out


@dataclass(frozen=True)
class Fault:
    """`do` harms the cluster during the run and may wait in between; the clock starts before it."""

    name: str
    do: Callable[[Network, Program], None]
    worker_nodes: int = 3  # one more than the run needs
    workers: str = "2"
    elastic: bool = False


def training_node(net: Network, run: Program) -> Node:
    return next(n for n in net.nodes[1:] if n.find(WORKER[run.kind]))


def kill_worker(net: Network, run: Program) -> None:
    os.kill(training_node(net, run).find(WORKER[run.kind])[0], signal.SIGKILL)


def kill_node(net: Network, run: Program) -> None:
    training_node(net, run).kill()


def node_comes_back(net: Network, run: Program) -> None:
    victim = training_node(net, run)
    victim.kill()
    time.sleep(5)
    victim.start()


def cut(seconds: float) -> Callable[[Network, Program], None]:
    def do(net: Network, run: Program) -> None:
        victim = training_node(net, run)
        victim.unplug()
        time.sleep(seconds)
        victim.plug()

    return do


def slow_node(net: Network, run: Program) -> None:
    victim = training_node(net, run)
    victim.slow("4mbit")
    time.sleep(20)
    victim.fast()


def restart_cluster(net: Network, run: Program) -> None:
    """The head dies, and with it the driver; the nodes are started again and the same command runs again."""
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


def measure(fault: Fault, kind: str, storage: Path, calm: Runs | None) -> Row:
    """One program with its fault. Raises RuntimeError when it does not survive."""
    name = kind + "-" + "".join(c if c.isalnum() else "-" for c in fault.name).strip("-")[:40]
    for old in run_folders(storage, name):
        shutil.rmtree(old)
    with network(1 + fault.worker_nodes, cpus=[0] + [1] * fault.worker_nodes) as net:
        run = Program(net, storage, name, kind, fault.workers)
        run.wait_for_step(FAULT_AT)
        before, at = run.images(), time.time()
        fault.do(net, run)
        run.finish()
        pauses = {run_id: longest_pause(steps, at) for run_id, steps in run.steps().items()}
        recovery, _ = max(pauses.values())
        lost = sum(max(before[run_id] - first + BATCH, 0) for run_id, (_, first) in pauses.items())
        return Row(
            fault=fault.name,
            program=kind,
            workers=fault.workers if kind == "train" else "2 trials x 1",
            recovery_seconds=round(recovery, 1),
            lost_images=lost,
            checkpoint_every_images=BATCH * CHECKPOINT_STEPS,
            images=BATCH * STEPS,
            outcome=compare(run, calm),
            seconds=round(time.time() - run.started, 1),
            load=round(os.getloadavg()[1], 1),
        )


def longest_pause(steps: list[tuple[int, float]], at: float) -> tuple[float, int]:
    """(seconds from the fault to the first step after the longest pause that follows it, images seen at that step)."""
    after = [(images, t) for images, t in steps if t >= at]
    if not after:
        raise RuntimeError("no step after the fault")
    pauses, previous = [], at
    for images, t in after:
        pauses.append((t - previous, t - at, images))
        previous = t
    _, since, images = max(pauses)
    return since, images


def compare(run: Runs, calm: Runs | None) -> str:
    if calm is None:
        return "not compared"
    ours, theirs = run.weights(), calm.weights()
    if ours == theirs:
        return "weights identical to the calm run"
    if set(ours) != set(theirs):
        raise RuntimeError(f"other runs than in the calm program: {set(ours) ^ set(theirs)}")
    a, b = run.losses(), calm.losses()
    worst = max(abs(a[i] - b[i]) / max(abs(b[i]), 1e-12) for i in set(a) & set(b))
    return f"loss within {worst:.1e} of the calm run, relative, at every step"


def save(row: Row) -> None:
    """Write the table with this row in the place of an earlier one of the same fault and program."""
    earlier = {(r["fault"], r["program"]): r for r in read_csv(RESULTS)}
    earlier.pop((row.fault, row.program), None)
    write_csv(RESULTS, [*earlier.values(), asdict(row) | made_by()])


def calm_program(kind: str, storage: Path) -> Runs:
    """The program without a fault; one that is in the storage already is used again."""
    name = f"calm-{kind}"
    done = Runs(storage, name)
    with contextlib.suppress(OSError):
        if len(done.weights()) == (1 if kind == "train" else 2):
            return done
    with network(3, cpus=[0, 1, 1]) as net:
        run = Program(net, storage, name, kind)
        run.finish()
        return run


def main(
    names: Annotated[list[str] | None, typer.Argument(help="parts of the names of faults; default all")] = None,
    program: Annotated[str, typer.Option(help="train or sweep")] = "train",
    storage: Annotated[Path | None, typer.Option(help="kept, so that a later call uses its calm run")] = None,
) -> None:
    """Do each fault to a program and write what it cost."""
    if reason := unavailable():
        raise SystemExit(f"not measured: {reason}")
    place = storage or Path(tempfile.mkdtemp(prefix="dsf-", dir="/tmp"))
    try:
        calm = calm_program(program, place)
        for fault in FAULTS:
            if (names and not any(n in fault.name for n in names)) or (fault.elastic and program == "sweep"):
                continue
            row = measure(fault, program, place, calm)
            save(row)
            print(f"{row.fault}: {row.recovery_seconds} s, {row.lost_images} images again, {row.outcome}", flush=True)
    finally:
        if storage is None:
            shutil.rmtree(place, ignore_errors=True)


if __name__ == "__main__":
    typer.run(main)
