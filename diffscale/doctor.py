"""`python -m diffscale.doctor [PRESET_OR_FILE] [key=value ...]`: problems of a cluster, before money is spent.

Checks every node of the cluster: versions, authentication, GPUs and an all-reduce over them, the storage, the dataset,
clocks, disks and shared memory, the weights of the metrics, and the memory that the preset needs. Prints a table with a
fix for each failure. Exit code 0: go ahead (warnings allowed), 1: something failed, 2: the settings are wrong.
"""

from __future__ import annotations

import os
import sys
import uuid
from typing import TYPE_CHECKING, Annotated

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from diffscale.config.load import load_experiment
from diffscale.core import storage as places
from diffscale.core.app import command_app, run_app
from diffscale.preflight import checks, node_facts
from diffscale.preflight.checks import Finding
from diffscale.preflight.node_facts import NodeFacts, ProbeSpec

if TYPE_CHECKING:
    from diffscale.config.experiment import Experiment

app = command_app()
STYLES = {"ok": "green", "warning": "yellow", "failure": "bold red"}


@app.command()
def main(
    preset: Annotated[str | None, typer.Argument(help="preset or YAML file; without it only the cluster")] = None,
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value, as for train")] = None,
    address: Annotated[str | None, typer.Option(help="of the cluster; default $RAY_ADDRESS, else this machine")] = None,
    storage: Annotated[str | None, typer.Option(help="to check without a preset; default $DIFFSCALE_STORAGE")] = None,
) -> None:
    """Check a cluster, and whether a preset will run on it."""
    experiment = load_experiment(preset, overrides or []) if preset else None
    place = experiment.storage if experiment else places.resolve(storage or places.default_storage())
    findings = examine(experiment, place, address)
    show(findings)
    raise typer.Exit(int(any(f.level == "failure" for f in findings)))


def examine(experiment: Experiment | None, storage: str, address: str | None = None) -> list[Finding]:
    """All findings, in the order of the table. Connects to Ray (and leaves it connected)."""
    from diffscale.distributed.connect import authentication_mode, connect  # import cost

    connect(address)
    import ray

    from diffscale.preflight import cluster

    private = not (address or os.environ.get("RAY_ADDRESS"))
    findings = checks.authentication(authentication_mode(), private, checks.default_token_file())
    path, content_hash, problems = _driver_data(experiment, storage)
    findings += problems
    metrics = experiment.eval.metrics if experiment and experiment.eval.n_generated else ()
    probe = places.join(storage, f".doctor-{uuid.uuid4().hex[:12]}")
    try:
        findings += _leave_probe(probe)
        nodes, silent = cluster.gather_all(ProbeSpec(storage, probe, path, tuple(metrics)))
        written = [name.rsplit("/", 1)[-1] for name in _probe_files(probe)]
    finally:
        _remove(probe)
    findings += silent
    if not nodes:
        return findings
    gpu = _wants_gpu(experiment, nodes)
    shown = ", ".join(f"{n.host} ({n.cpus} CPUs, {len(n.gpus)} GPUs)" for n in nodes)
    findings.append(Finding("nodes", "ok", f"Ray {ray.__version__}: {shown}"))
    findings += checks.versions(nodes, node_facts.versions())
    findings += checks.gpus(nodes, _workers(experiment) if gpu else 0)
    findings.append(cluster.all_reduce(gpu and any(n.gpus for n in nodes)))
    findings += checks.storage(nodes, storage, written)
    if path:
        findings += checks.dataset(nodes, path, content_hash)
    findings += checks.clocks(cluster.clock_offsets()) + checks.disks(nodes) + checks.metrics(nodes)
    if experiment is not None and path:
        findings += checks.memory(_memory(experiment), nodes, gpu)
    return findings


def show(findings: list[Finding], console: Console | None = None) -> None:
    """The table, failures last so that they stay on the screen, and one line that says whether to go ahead."""
    console = console or Console(width=None if sys.stdout.isatty() else 140)
    table = Table(box=box.SIMPLE_HEAD, show_edge=False)
    for column in ("check", "result", "found", "fix"):
        table.add_column(column, overflow="fold")
    for finding in sorted(findings, key=lambda f: ("ok", "warning", "failure").index(f.level)):
        style = STYLES[finding.level]
        table.add_row(finding.check, f"[{style}]{finding.level}[/]", finding.found, finding.fix)
    console.print(table)
    failed = sum(f.level == "failure" for f in findings)
    warned = sum(f.level == "warning" for f in findings)
    console.print(f"{failed} failed, {warned} warnings" if failed or warned else "all checks passed")


def _driver_data(experiment: Experiment | None, storage: str) -> tuple[str, str, list[Finding]]:
    """Resolved path and content hash of the dataset as the driver sees it; builtin images are built here."""
    if experiment is None:
        return "", "", []
    from diffscale.data import open_dataset, resolve

    try:
        path = resolve(experiment.data.path, experiment.data.resolution, storage)
        return path, open_dataset(path).content_hash, []
    except (OSError, ValueError) as error:
        fix = "see python -m diffscale.data build --help; data.path must exist on every node"
        return "", "", [Finding("dataset", "failure", " ".join(str(error).split())[:300], fix)]


def _leave_probe(probe: str) -> list[Finding]:
    try:
        places.write_bytes(places.join(probe, "driver"), b"diffscale doctor")
    except OSError as error:
        fix = "create the folder or bucket, or give this user or role write access"
        return [Finding("storage", "failure", f"the driver cannot write: {' '.join(str(error).split())[:300]}", fix)]
    return []


def _probe_files(probe: str) -> list[str]:
    try:
        return places.list_files(probe)
    except OSError:
        return []


def _remove(probe: str) -> None:
    try:
        fs, path = places.filesystem(probe)
        fs.delete_dir(path)
    except OSError:
        pass  # nothing was written


def _wants_gpu(experiment: Experiment | None, nodes: list[NodeFacts]) -> bool:
    wanted = experiment.train.gpu if experiment else "auto"
    return any(n.gpus for n in nodes) if wanted == "auto" else bool(wanted)


def _workers(experiment: Experiment | None) -> int:
    """Return the fewest workers with which the run starts."""
    return experiment.train.min_workers if experiment else 0


def _memory(experiment: Experiment) -> int:
    from diffscale.config.factory import open_training_data
    from diffscale.preflight.memory import needed_bytes

    return needed_bytes(experiment, open_training_data(experiment))


if __name__ == "__main__":
    run_app(app)
