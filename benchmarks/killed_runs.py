"""`python -m benchmarks.killed_runs [SEED ...]`: runs killed at random moments end with the weights of a calm one.

Each seed is one training run of a small UNet on two of three one-CPU Ray nodes of this machine. Five times (`--kills`),
at a random step and a random part of a second after it, SIGKILL goes to a worker, to the command that trains, or to all
processes of a node. A killed command is given again, a lost node is replaced by a new one. At the end the weights,
averages and optimizer state are compared, as files, with those of an uninterrupted run. A row per kill goes to
benchmarks/results/killed_runs.csv; a seed that is run again replaces its rows.
"""

from __future__ import annotations

import csv
import os
import random
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from itertools import cycle, islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import psutil
import typer

from benchmarks.throughput.pairs import made_by
from diffscale.training import checkpoint as ck
from diffscale.training.history import read_history

if TYPE_CHECKING:
    from ray.cluster_utils import Cluster

RESULTS = Path(__file__).parent / "results" / "killed_runs.csv"
BATCH, STEPS, CHECKPOINT_STEPS = 12, 600, 40
KINDS = ("worker", "command", "node")
LIMIT = 300.0  # seconds for anything that is waited for
DYING = 5.0  # seconds in which workers of a killed command or node may still make steps; no recovery is as fast
SETTINGS = [
    "data.resolution=8", "model.model_channels=16", "model.channel_mult=[1,2]", "model.num_blocks=1",
    "model.attn_resolutions=[4]", "eval.n_generated=0", "train.trackers=[]", "train.compile=false",
    "train.channels_last=false", "train.precision=fp32", "train.workers=2", "train.gpu=false", "train.max_failures=-1",
    "train.ema.power=[0.05,0.10]", f"train.global_batch={BATCH}", "train.flops=null", f"train.images={BATCH * STEPS}",
    f"train.log_every_images={BATCH}", f"train.checkpoint.every_images={BATCH * CHECKPOINT_STEPS}",
]  # fmt: skip


@dataclass(frozen=True)
class Row:
    seed: int
    kill: int  # of this run, from 1
    killed: str  # worker, command or node
    at_images: int  # seen when it happened
    resumed_images: int  # of the checkpoint that training went on from
    seconds: float  # from the kill to the next step
    outcome: str  # of the run


class Run:
    """`python -m diffscale.train` on the cluster, given again when it was killed."""

    def __init__(self, address: str, storage: Path, name: str) -> None:
        self.storage, self.name, self.log = storage, name, storage / f"{name}.log"
        self.environment = {**os.environ, "RAY_ADDRESS": address, "OMP_NUM_THREADS": "1"}
        self.command = [
            sys.executable, "-m", "diffscale.train", "quickstart-unet", f"storage={storage}", f"name={name}", *SETTINGS
        ]  # fmt: skip
        self.start()

    def start(self) -> None:
        with self.log.open("a") as log:
            self.process = subprocess.Popen(self.command, env=self.environment, stdout=log, stderr=log)

    @property
    def folder(self) -> Path:
        return next(iter(self.storage.glob(f"runs/{self.name}-*")), self.storage / "none")

    def last(self) -> tuple[int, float]:
        """Images seen at the newest step of its history, and when that was."""
        rows = read_history(str(self.folder))
        return (rows[-1]["images_seen"], rows[-1]["time"]) if rows else (0, 0.0)

    def wait(self, condition: Callable[[], Any], what: str) -> None:
        """Raises RuntimeError when the run ends before."""

        def met() -> bool:
            return condition() or self.process.poll() is not None

        wait_for(met, what)
        if self.process.poll() is not None and not condition():
            raise RuntimeError(f"{what}: the command ended before:\n{self.log.read_text()[-3000:]}")

    def finish(self) -> None:
        code = self.process.wait(LIMIT)
        if code:
            raise RuntimeError(f"exit code {code}:\n{self.log.read_text()[-3000:]}")

    def tensors(self) -> dict[str, bytes]:
        """Every tensor file of the last checkpoint."""
        last = Path(ck.folder_of(str(self.folder), BATCH * STEPS))
        return {str(path.relative_to(last)): path.read_bytes() for path in sorted(last.rglob("*.safetensors"))}


def wait_for(condition: Callable[[], Any], what: str) -> Any:
    end = time.monotonic() + LIMIT
    while time.monotonic() < end:
        if found := condition():
            return found
        time.sleep(0.02)
    raise TimeoutError(f"{what}: not within {LIMIT:.0f} s")


def workers() -> list[psutil.Process]:
    """The training processes below this one, which started the nodes."""
    found = []
    for child in psutil.Process().children(recursive=True):
        try:
            if "RayTrainWorker" in " ".join(child.cmdline()):
                found.append(child)
        except psutil.Error:
            continue
    return found


class Killer:
    """Sends SIGKILL to one of KINDS, and puts back what a person would."""

    def __init__(self, cluster: Cluster, nodes: list[Any], run: Run, choice: random.Random) -> None:
        self.cluster, self.nodes, self.run, self.choice = cluster, nodes, run, choice

    def kill(self, kind: str) -> None:
        if kind == "command":
            self.run.process.kill()
            self.run.process.wait()
            self.run.start()
            return
        victim = self.choice.choice(wait_for(workers, "a worker"))
        if kind == "worker":
            victim.kill()
            return
        raylet = victim.ppid()
        node = next(n for n in self.nodes if any(p.process.pid == raylet for p in n.all_processes["raylet"]))
        self.cluster.remove_node(node, allow_graceful=False)
        self.nodes.remove(node)
        self.nodes.append(self.cluster.add_node(num_cpus=1))


@contextmanager
def cluster_of_three() -> Iterator[tuple[Cluster, list[Any]]]:
    """A head without CPUs and three nodes with one each, behind a token: Ray gives them this machine's address."""
    os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32), "RAY_USAGE_STATS_ENABLED": "0"}
    os.environ.pop("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", None)  # 0 leaves the nodes on the loopback, unreachable (2.60)
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    try:
        yield cluster, [cluster.add_node(num_cpus=1) for _ in range(3)]
    finally:
        cluster.shutdown()


def killed_run(
    cluster: Cluster, nodes: list[Any], storage: Path, seed: int, count: int, whole: dict[str, bytes]
) -> list[Row]:
    """One run with its kills. Raises RuntimeError or TimeoutError when it does not come to its end."""
    choice = random.Random(seed)
    kinds = list(islice(cycle(KINDS), count))
    choice.shuffle(kinds)
    steps = sorted(choice.sample(range(STEPS // 20, STEPS - CHECKPOINT_STEPS), count))
    for old in storage.glob(f"runs/killed-{seed}-*"):
        shutil.rmtree(old)
    run = Run(cluster.address, storage, f"killed-{seed}")
    killer, kills = Killer(cluster, nodes, run, choice), []
    for step, kind in zip(steps, kinds, strict=True):
        run.wait(lambda step=step: run.last()[0] >= step * BATCH, f"step {step}")  # type: ignore[misc]
        time.sleep(choice.random() / 2)
        before, at = run.last()[0], time.time()
        resumed = max([ck.images_of(c) for c in ck.list_checkpoints(str(run.folder))], default=0)
        killer.kill(kind)
        run.wait(lambda at=at: run.last()[1] > at + DYING, "the next step")  # type: ignore[misc]
        following = next(row["time"] for row in read_history(str(run.folder)) if row["time"] > at + DYING)
        kills.append((kind, before, resumed, following - at))
        print(f"seed {seed}: {kind} killed at {before}, next step after {kills[-1][3]:.1f} s", flush=True)
    run.finish()
    outcome = "weights identical" if run.tensors() == whole else "weights differ"
    return [
        Row(
            seed=seed, kill=number, killed=kind, at_images=images, resumed_images=resumed, seconds=round(seconds, 1),
            outcome=outcome,
        )
        for number, (kind, images, resumed, seconds) in enumerate(kills, 1)
    ]  # fmt: skip


def save(path: Path, rows: list[Row]) -> None:
    """The table with these rows in the place of those of the same seeds."""
    kept, made = [], made_by()
    if path.exists():
        with path.open(newline="") as file:
            kept = [row for row in csv.DictReader(file) if int(row["seed"]) not in {r.seed for r in rows}]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*(f.name for f in fields(Row)), *made], lineterminator="\n")
        writer.writeheader()
        new = [asdict(row) | made for row in rows]
        writer.writerows(sorted([*kept, *new], key=lambda row: (int(row["seed"]), int(row["kill"]))))


def main(
    seeds: Annotated[list[int] | None, typer.Argument(help="one run each; default 0 to 3")] = None,
    kills: Annotated[int, typer.Option(help="of each run")] = 5,
    storage: Annotated[Path | None, typer.Option(help="kept, so that a later call uses its calm run")] = None,
    out: Annotated[Path, typer.Option(help="the table")] = RESULTS,
) -> None:
    """Kill runs at random moments and compare what they end with."""
    differing = []
    with tempfile.TemporaryDirectory(prefix="diffscale-killed-") as temporary, cluster_of_three() as (cluster, nodes):
        folder = storage or Path(temporary)
        calm = Run(cluster.address, folder, "calm")
        calm.finish()
        whole = calm.tensors()
        print("calm run finished", flush=True)
        for seed in seeds or range(4):
            rows = killed_run(cluster, nodes, folder, seed, kills, whole)
            save(out, rows)
            print(f"seed {seed}: {rows[0].outcome}", flush=True)
            differing += [seed for row in rows[:1] if row.outcome != "weights identical"]
    if differing:
        raise SystemExit(f"not bit-identical: seeds {differing}")


if __name__ == "__main__":
    typer.run(main)
