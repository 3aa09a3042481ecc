"""Runs every check of `python -m diffscale.doctor` in order: connects, gathers the facts, collects the findings."""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING

from diffscale.core import storage as places
from diffscale.core.text import one_line
from diffscale.distributed.connect import authentication_mode, connect
from diffscale.preflight import checks, node_facts
from diffscale.preflight.checks import Finding
from diffscale.preflight.node_facts import NodeFacts, ProbeSpec

if TYPE_CHECKING:
    from diffscale.config.experiment import Experiment
    from diffscale.data import Dataset

Settle = Callable[["Experiment", "Dataset"], "Experiment"]


def examine(experiment: Experiment | None, storage: str, settle: Settle, address: str | None = None) -> list[Finding]:
    """Return all findings in the order of the checks. Connects to Ray and leaves it connected.

    experiment: the run to prepare for; None checks the cluster alone.
    storage: absolute path or URI.
    settle: returns an experiment with what training makes of each "auto" of its numerics
    address: address of the cluster; None for $RAY_ADDRESS, else a private Ray on this machine.
    """
    connect(address)
    # Ray reads the variables that connect() sets when it is imported.
    import ray  # import cost

    from diffscale.preflight import cluster  # import cost

    private = not (address or os.environ.get("RAY_ADDRESS"))
    findings = checks.authentication(authentication_mode(), private, checks.default_token_file())
    data_path, content_hash, problems = _driver_data(experiment, storage)
    findings += problems
    metrics = experiment.eval.metrics if experiment and experiment.eval.n_generated else ()
    probe = places.join(storage, f".doctor-{uuid.uuid4().hex[:12]}")
    try:
        findings += _write_probe(probe)
        nodes, silent = cluster.gather_all(ProbeSpec(storage, probe, data_path, tuple(metrics)))
        written = [name.rsplit("/", 1)[-1] for name in _probe_files(probe)]
    finally:
        _remove_probe(probe)
    findings += silent
    if not nodes:
        return findings
    on_gpu = _wants_gpu(experiment, nodes)
    workers = experiment.train.min_workers if experiment else 0
    shown = ", ".join(f"{n.host} ({n.cpus} CPUs, {len(n.gpus)} GPUs)" for n in nodes)
    findings.append(Finding("nodes", "ok", f"Ray {ray.__version__}: {shown}"))
    findings += checks.versions(nodes, node_facts.versions())
    findings += checks.gpus(nodes, workers if on_gpu else 0)
    findings.append(cluster.all_reduce(on_gpu and any(n.gpus for n in nodes)))
    findings += checks.storage(nodes, storage, written)
    if data_path:
        findings += checks.dataset(nodes, data_path, content_hash)
    findings += checks.clocks(cluster.clock_offsets()) + checks.disks(nodes) + checks.metrics(nodes)
    if experiment is not None and data_path:
        from diffscale.config.factory import open_training_data  # import cost
        from diffscale.preflight.memory import estimate  # import cost

        dataset = open_training_data(experiment)
        device = checks.device_memory(nodes, on_gpu) if on_gpu else None
        train = experiment.train
        on_a_node = checks.workers_of_a_node(nodes, on_gpu, train.min_workers, train.cpus_per_worker)
        holders = on_a_node if train.parallel == "hsdp" else None
        needed = estimate(settle(experiment, dataset), dataset, device=device, holders=holders)
        findings += checks.memory(needed, nodes, on_gpu)
    return findings


def _driver_data(experiment: Experiment | None, storage: str) -> tuple[str, str, list[Finding]]:
    """Return the dataset's resolved path and content hash as the driver sees them; builtin images are built first."""
    if experiment is None:
        return "", "", []
    from diffscale.config.factory import data_place  # import cost
    from diffscale.data import open_dataset  # import cost

    try:
        path = data_place(experiment.model_copy(update={"storage": storage}), experiment.data.resolution)
        return path, open_dataset(path).content_hash, []
    except (OSError, ValueError) as error:
        fix = "see python -m diffscale.data build --help; data.path must exist on every node"
        return "", "", [Finding("dataset", "failure", one_line(error, 300), fix)]


def _write_probe(probe: str) -> list[Finding]:
    """Write the driver's file, which every node then looks for."""
    try:
        places.write_bytes(places.join(probe, "driver"), b"diffscale doctor")
    except OSError as error:
        fix = "create the folder or bucket, or give this user or role write access"
        return [Finding("storage", "failure", f"the driver cannot write: {one_line(error, 300)}", fix)]
    return []


def _probe_files(probe: str) -> list[str]:
    try:
        return places.list_files(probe)
    except OSError:
        return []


def _remove_probe(probe: str) -> None:
    with suppress(OSError):  # nothing was written
        fs, path = places.filesystem(probe)
        fs.delete_dir(path)


def _wants_gpu(experiment: Experiment | None, nodes: list[NodeFacts]) -> bool:
    wanted = experiment.train.gpu if experiment else "auto"
    return any(n.gpus for n in nodes) if wanted == "auto" else bool(wanted)
