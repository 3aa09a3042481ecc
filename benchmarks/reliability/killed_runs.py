"""`python -m benchmarks.reliability.killed_runs [CASE ...]`: runs killed at random moments end as a calm run does.

Each case is one training run on two of three one-CPU Ray nodes of this machine: the quickstart's UNet by
default, then small networks of every backbone, over precisions, memory formats, convolution algorithms, compilation,
optimizers, DDP and FSDP2. At random steps and a random part of a second after them, SIGKILL goes to a worker, to the
command that trains, or to all processes of a node. A killed command is started again, a lost node is replaced by a new
one. At the end the weights, averages and optimizer state are compared, as files, with those of an uninterrupted run,
and the loss history row by row. A row per kill goes to benchmarks/results/killed_runs.csv; a case that is run again
replaces its rows.
"""

from __future__ import annotations

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
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import psutil
import typer

from benchmarks.common.machine import made_by
from benchmarks.common.measure import read_csv, wait_for, write_csv
from diffscale.core.errors import UserError
from diffscale.core.text import nearest
from diffscale.training.checkpoint import layout as ck
from diffscale.training.metrics_log import read_history

if TYPE_CHECKING:
    from ray.cluster_utils import Cluster

RESULTS = Path(__file__).parents[1] / "results" / "killed_runs.csv"
KINDS = ("worker", "command", "node")
LIMIT = 400.0  # seconds for anything that is waited for
DYING = 5.0  # seconds in which workers of a killed command or node may still make steps; no recovery is as fast
VARYING = {"time", "images_per_second", "mfu", "data_stall", "memory_bytes", "device_seconds", "cost"}


@dataclass(frozen=True)
class Case:
    """A run to be killed `kills` times: a preset with dotted settings over it."""

    kills: int
    settings: tuple[str, ...] = ()
    preset: str = "quickstart-unet"
    batch: int = 32
    steps: int = 100
    checkpoint_steps: int = 25

    @property
    def command(self) -> list[str]:
        return [
            sys.executable,
            "-m",
            "diffscale.train",
            self.preset,
            "eval.n_generated=0",
            "train.trackers=[]",
            "train.gpu=false",
            "train.max_failures=-1",
            "train.flops=null",
            f"train.images={self.batch * self.steps}",
            f"train.checkpoint.every_images={self.batch * self.checkpoint_steps}",
            f"train.log_every_images={self.batch}",
            *self.settings,
        ]


def small(kills: int, model: str, *settings: str) -> Case:
    """A network of tens of thousands of weights on 8-pixel images, with two averages for post-hoc EMA."""
    of_all = "data.resolution=8", "train.global_batch=12", "train.ema.power=[0.05,0.10]", *NETWORKS[model]
    return Case(kills, (*of_all, *settings), batch=12, steps=240, checkpoint_steps=20)


NETWORKS = {
    "unet": ("model.model_channels=16", "model.attn_resolutions=[4]", "model.channels_per_head=16"),
    "edm2": ("model={name: edm2, model_channels: 16, channel_mult: [1, 2], num_blocks: 1, channels_per_head: 16}",),
    "uvit": ("model={name: uvit, conv_widths: [16], conv_blocks: 1, width: 32, depth: 2, num_heads: 2}",),
    "rin": (
        "model={name: rin, patch_size: 2, interface_width: 32, latents: 8, latent_width: 32, latent_heads: 2, "
        "rw_heads: 2, num_blocks: 1, layers: 1}",
    ),
    "dit": ("model={name: dit, patch_size: 2, width: 32, depth: 2, num_heads: 2}",),
    "jit": ("model={name: jit, patch_size: 2, bottleneck: 16, width: 32, depth: 2, num_heads: 2, context_start: 1}",),
    "hdit": ("model={name: hdit, patch_size: 1, widths: [32, 64], depths: [1, 1], head: 16, global_levels: 1}",),
}
CASES = {
    "defaults": Case(3),
    "defaults-one-worker": Case(2, ("train.workers=1",)),
    "fp32-contiguous": Case(1, ("train.precision=fp32", "train.channels_last=false")),
    "fp32-channels-last": Case(1, ("train.precision=fp32", "train.channels_last=true")),
    "fp32-winograd": small(1, "unet", "train.precision=fp32", "train.channels_last=true", "train.winograd=true"),
    "bf16-contiguous": small(1, "unet", "train.precision=bf16", "train.channels_last=false"),
    "bf16-winograd": small(1, "unet", "train.precision=bf16", "train.channels_last=true", "train.winograd=true"),
    "bf16-channels-last": small(2, "unet", "train.precision=bf16", "train.channels_last=true"),
    "lamb": small(1, "unet", "optim.name=lamb"),
    "muon": small(1, "unet", "optim.name=muon"),
    "fsdp2": small(1, "unet", "train.parallel=fsdp2"),
    "fsdp2-lamb": small(1, "rin", "train.parallel=fsdp2", "optim.name=lamb"),
    "unet-compiled": small(1, "unet", "train.compile=true"),
    "dit-compiled": small(1, "dit", "train.compile=true"),
    "edm2": small(1, "edm2"),
    "uvit": small(1, "uvit"),
    "rin": small(1, "rin"),
    "rin-conv": Case(1, ("train.global_batch=16",), preset="emoji-rin-conv", batch=16, steps=80, checkpoint_steps=20),
    "jit": small(1, "jit"),
    "hdit": small(1, "hdit"),
}


@dataclass(frozen=True)
class Row:
    case: str
    settings: str  # of the case, over those that all cases share
    kill: int  # of this run, from 1
    killed: str  # worker, command or node
    at_images: int  # seen when it happened
    resumed_images: int  # of the checkpoint from which training resumed
    seconds: float  # from the kill to the next step
    outcome: str  # of the run


class Run:
    """`python -m diffscale.train` on the cluster, started again after a kill."""

    def __init__(self, address: str, storage: Path, name: str, case: Case) -> None:
        self.storage, self.name, self.case = storage, name, case
        self.log = storage / f"{name}.log"
        self.environment = {**os.environ, "RAY_ADDRESS": address, "OMP_NUM_THREADS": "1"}
        self.command = [*case.command, f"storage={storage}", f"name={name}"]
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
        """Wait until the condition holds. Raises RuntimeError when the run ends first."""

        def met() -> bool:
            return condition() or self.process.poll() is not None

        wait_for(met, LIMIT, what, every=0.02)
        if self.process.poll() is not None and not condition():
            raise RuntimeError(f"{what}: the command ended before:\n{self.log.read_text()[-3000:]}")

    def finish(self) -> None:
        code = self.process.wait(LIMIT)
        if code:
            raise RuntimeError(f"exit code {code}:\n{self.log.read_text()[-3000:]}")

    def tensors(self) -> dict[str, bytes]:
        """Every tensor file of the last checkpoint."""
        last = Path(ck.folder_of(str(self.folder), self.case.batch * self.case.steps))
        return {str(path.relative_to(last)): path.read_bytes() for path in sorted(last.rglob("*.safetensors"))}

    def history(self) -> list[dict[str, Any]]:
        """Return the rows, without what depends on the machine's speed."""
        return [{k: v for k, v in row.items() if k not in VARYING} for row in read_history(str(self.folder))]


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
        victim = self.choice.choice(wait_for(workers, LIMIT, "a worker", every=0.02))
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
    from ray.cluster_utils import Cluster  # import cost

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    try:
        yield cluster, [cluster.add_node(num_cpus=1) for _ in range(3)]
    finally:
        cluster.shutdown()


def killed_run(cluster: Cluster, nodes: list[Any], storage: Path, name: str) -> list[Row]:
    """A calm run of a case, and one with its kills. Raises RuntimeError or TimeoutError where one does not end."""
    case = CASES[name]
    for old in storage.glob(f"runs/*{name}-*"):
        shutil.rmtree(old)
    calm = Run(cluster.address, storage, f"calm-{name}", case)
    calm.finish()
    choice = random.Random(name)
    kinds = choice.sample(KINDS, len(KINDS))[: case.kills]
    steps = sorted(choice.sample(range(case.steps // 20, case.steps - case.checkpoint_steps), case.kills))
    run = Run(cluster.address, storage, f"killed-{name}", case)
    killer, kills = Killer(cluster, nodes, run, choice), []
    for step, kind in zip(steps, kinds, strict=True):
        run.wait(lambda step=step: run.last()[0] >= step * case.batch, f"step {step}")  # type: ignore[misc]
        time.sleep(choice.random() / 2)
        before, at = run.last()[0], time.time()
        resumed = max([ck.images_of(c) for c in ck.list_checkpoints(str(run.folder))], default=0)
        killer.kill(kind)
        run.wait(lambda at=at: run.last()[1] > at + DYING, "the next step")  # type: ignore[misc]
        following = next(row["time"] for row in read_history(str(run.folder)) if row["time"] > at + DYING)
        kills.append((kind, before, resumed, following - at))
        print(f"{name}: {kind} killed at {before}, next step after {kills[-1][3]:.1f} s", flush=True)
    run.finish()
    differing = [what for what in ("tensors", "history") if getattr(run, what)() != getattr(calm, what)()]
    return [
        Row(
            case=name,
            settings=" ".join(case.settings),
            kill=number,
            killed=kind,
            at_images=images,
            resumed_images=resumed,
            seconds=round(seconds, 1),
            outcome=f"{' and '.join(differing)} differ" if differing else "identical",
        )
        for number, (kind, images, resumed, seconds) in enumerate(kills, 1)
    ]


def save(path: Path, rows: list[Row]) -> None:
    """Write the table with these rows in the place of those of the same cases."""
    made, order = made_by(), list(CASES)
    kept = [row for row in read_csv(path) if row.get("case") not in {r.case for r in rows}]
    table = [*kept, *(asdict(row) | made for row in rows)]
    write_csv(path, sorted(table, key=lambda row: (order.index(row["case"]), int(row["kill"]))))


def main(
    cases: Annotated[list[str] | None, typer.Argument(help="default: all of them")] = None,
    storage: Annotated[Path | None, typer.Option(help="kept, with the logs of the commands")] = None,
    out: Annotated[Path, typer.Option(help="the table")] = RESULTS,
) -> None:
    """Kill runs at random moments and compare what they end with."""
    for name in cases or []:
        if name not in CASES:
            raise UserError(setting="CASE", value=name, expected=nearest(name, CASES))
    differing = []
    with tempfile.TemporaryDirectory(prefix="diffscale-killed-") as temporary, cluster_of_three() as (cluster, nodes):
        folder = (storage or Path(temporary)).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        for name in cases or CASES:
            rows = killed_run(cluster, nodes, folder, name)
            save(out, rows)
            print(f"{name}: {rows[0].outcome}", flush=True)
            differing += [name] if rows[0].outcome != "identical" else []
    if differing:
        raise SystemExit(f"not the same as the calm run: {', '.join(differing)}")


if __name__ == "__main__":
    typer.run(main)
