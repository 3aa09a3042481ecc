"""Checks over the collected facts: each returns findings, each failure comes with its fix. Pure functions of facts."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from diffscale.core.text import gigabytes
from diffscale.preflight.node_facts import NodeFacts

if TYPE_CHECKING:
    from diffscale.preflight.memory import Estimate

Level = Literal["ok", "warning", "failure"]

MINIMUM = {"python": "3.11", "torch": "2.11", "ray": "2.60"}  # as in pyproject.toml
SKEW_WARNING, SKEW_FAILURE = 1.0, 30.0  # seconds; S3 refuses requests that are 15 minutes off, logs mislead much sooner
DISK_WARNING, DISK_FAILURE = 20e9, 2e9  # bytes: Ray spills objects and logs there; checkpoints are written there
SHARED_MEMORY_WARNING, SHARED_MEMORY_FAILURE = 1e9, 256e6  # bytes; Docker's default of 64 MB stops the object store
MEMORY_WARNING = 0.85  # of the device: fragmentation and the allocator's cache need the rest


@dataclass(frozen=True)
class Finding:
    """One line of doctor's table."""

    check: str
    level: Level
    found: str
    fix: str = ""


def versions(nodes: Sequence[NodeFacts], driver: dict[str, str]) -> list[Finding]:
    """Check that every node runs the driver's versions, and that no package is older than the oldest supported."""
    findings = []
    for name, own in sorted(driver.items()):
        if name in MINIMUM and _numbers(own) < _numbers(MINIMUM[name]):
            fix = f"install {name} >= {MINIMUM[name]} (constraints.txt has a tested set)"
            findings.append(Finding("versions", "failure", f"{name} {own}", fix))
        differing = [f"{n.host}: {n.versions.get(name, 'missing')}" for n in nodes if n.versions.get(name) != own]
        if differing:
            strict = name in ("python", "ray", "torch", "diffscale")
            found = f"{name} {own} here, but {', '.join(differing)}"
            fix = "use one image, or one environment, on all nodes and for the driver"
            findings.append(Finding("versions", "failure" if strict else "warning", found, fix))
    if not findings:
        shown = ", ".join(f"{name} {driver[name]}" for name in ("python", "ray", "torch", "diffscale"))
        findings.append(Finding("versions", "ok", shown))
    return findings


def authentication(mode: str, private: bool, token_file: Path | None) -> list[Finding]:
    """Check that a cluster which others can reach has a token, in a file that only its owner reads.

    mode: "token" or "disabled".
    private: whether the cluster is a Ray on this machine's loopback that this process started.
    """
    findings = []
    generate = "ray get-auth-token --generate > /dev/null && chmod 600 ~/.ray/auth_token"
    if mode == "token":
        findings.append(Finding("authentication", "ok", "token"))
    elif private:
        findings.append(Finding("authentication", "ok", f"{mode}; a private Ray on this machine's loopback"))
    else:
        fix = f"{generate}; then export RAY_AUTH_MODE=token on every node before `ray start`, and here"
        findings.append(Finding("authentication", "failure", "off: anyone who reaches the ports can run code", fix))
    if token_file is not None and token_file.is_file():
        permissions = stat.S_IMODE(token_file.stat().st_mode)
        if permissions & 0o077:
            found = f"{token_file} can be read by others (mode {permissions:04o})"
            level: Level = "warning" if private else "failure"
            findings.append(Finding("authentication", level, found, f"chmod 600 {token_file}"))
    return findings


def gpus(nodes: Sequence[NodeFacts], needed: int) -> list[Finding]:
    """Check that every GPU runs a kernel, and that the run finds the number of GPUs that it needs."""
    findings = []
    for n in nodes:
        if n.cuda_error:
            fix = "match the NVIDIA driver (nvidia-smi) to this torch's CUDA (torch.version.cuda)"
            findings.append(Finding("gpus", "failure", f"{n.host}: {n.cuda_error}", fix))
    found = [name for n in nodes for name, _ in n.gpus]
    kinds = ", ".join(f"{found.count(kind)} x {kind}" for kind in sorted(set(found))) or "none"
    if len(found) < needed:
        fix = "add GPU nodes (with an autoscaler: raise the minimum), or lower train.workers, or train.gpu=false"
        findings.append(Finding("gpus", "failure", f"{kinds}; train.workers needs {needed}", fix))
    elif len(set(found)) > 1:
        fix = "device-seconds of mixed GPUs do not compare; use one kind"
        findings.append(Finding("gpus", "warning", kinds, fix))
    else:
        nccl = sorted({n.nccl for n in nodes if n.nccl})
        findings.append(Finding("gpus", "ok", kinds + (f", NCCL {', '.join(nccl)}" if nccl else "")))
    return findings


def storage(nodes: Sequence[NodeFacts], uri: str, written: Sequence[str]) -> list[Finding]:
    """Check that every node reads the driver's file, and that the driver sees every node's file.

    written: ids of the nodes whose files the driver sees.
    """
    findings = []
    shared = "use s3:// or gs://, or mount one file system at this path on all nodes"
    for n in nodes:
        if n.storage_readable:
            found = f"{n.host} does not see the driver's file: {n.storage_readable}"
            findings.append(Finding("storage", "failure", found, shared))
        elif n.storage_writable:
            found = f"{n.host} cannot write: {n.storage_writable}"
            findings.append(Finding("storage", "failure", found, "give the nodes' user or role write access"))
        elif n.node_id not in written:
            found = f"{n.host} wrote a file that the driver does not see"
            findings.append(Finding("storage", "failure", found, shared))
    if not findings:
        free = [n.storage_free for n in nodes if n.storage_free is not None]
        level, fix = _disk(min(free)) if free else ("ok", "")
        room = f", {gigabytes(min(free))} free" if free else ""
        findings.append(Finding("storage", level, f"{uri}: read and written from {_count(nodes)}{room}", fix))
    return findings


def dataset(nodes: Sequence[NodeFacts], path: str, content_hash: str) -> list[Finding]:
    """Check that every node opens the data and finds the same content."""
    findings = []
    for n in nodes:
        if n.data_error:
            fix = "copy the dataset to storage that all nodes see, or mount it at this path everywhere"
            findings.append(Finding("dataset", "failure", f"{n.host}: {n.data_error}", fix))
        elif n.data_hash != content_hash:
            found = f"{n.host}: content {n.data_hash[:12]}, here {content_hash[:12]}"
            findings.append(Finding("dataset", "failure", found, "replace the node's copy; it is another dataset"))
    return findings or [Finding("dataset", "ok", f"{path}: content {content_hash[:12]} on {_count(nodes)}")]


def clocks(offsets: dict[str, tuple[float, float]]) -> list[Finding]:
    """Check that the clocks agree.

    offsets: for each host, the seconds by which its clock is ahead of the driver's, and half of the round trip (s),
        which bounds the error of the first number.
    """
    findings = []
    for host, (offset, uncertainty) in offsets.items():
        worst = max(abs(offset) - uncertainty, 0.0)
        if worst > SKEW_WARNING:
            level: Level = "failure" if worst > SKEW_FAILURE else "warning"
            fix = "start the time service on it (chronyd, systemd-timesyncd)"
            findings.append(Finding("clocks", level, f"{host} is {offset:+.1f} s off", fix))
    largest = max((abs(offset) for offset, _ in offsets.values()), default=0.0)
    return findings or [Finding("clocks", "ok", f"within {max(largest, 0.001):.3f} s")]


def disks(nodes: Sequence[NodeFacts]) -> list[Finding]:
    """Check that there is room for Ray's files, and shared memory for its objects."""
    findings = []
    for n in nodes:
        level, fix = _disk(n.temporary_free)
        if level != "ok":
            found = f"{n.host}: {gigabytes(n.temporary_free)} free in the temporary folder"
            findings.append(Finding("disk", level, found, fix))
        total, _ = n.shared_memory
        if total < SHARED_MEMORY_WARNING:
            fix = "docker: --shm-size=8g; Kubernetes: an emptyDir of medium Memory at /dev/shm"
            level = "failure" if total < SHARED_MEMORY_FAILURE else "warning"
            findings.append(Finding("shared memory", level, f"{n.host}: /dev/shm has {gigabytes(total)}", fix))
    if findings:
        return findings
    free, shared = min(n.temporary_free for n in nodes), min(n.shared_memory[0] for n in nodes)
    return [Finding("disk", "ok", f"at least {gigabytes(free)} free, {gigabytes(shared)} of shared memory")]


def metrics(nodes: Sequence[NodeFacts]) -> list[Finding]:
    """Check that the weights of the metrics' feature networks are on every node."""
    findings = []
    for metric in sorted({m for n in nodes for m in n.metric_errors}):
        missing = [(n.host, n.metric_errors[metric]) for n in nodes if n.metric_errors.get(metric)]
        if missing:
            hosts = ", ".join(host for host, _ in missing)
            fix = "follow the message; or choose eval.metrics whose weights are installed: [fd_efficientnet_lite0]"
            findings.append(Finding("metric weights", "failure", f"{metric} on {hosts}: {missing[0][1]}", fix))
        else:
            findings.append(Finding("metric weights", "ok", f"{metric} on {_count(nodes)}"))
    return findings


def device_memory(nodes: Sequence[NodeFacts], gpu: bool) -> int | None:
    """Return the bytes of the smallest GPU, or without `gpu` of the smallest node; None if there is none."""
    return min([size for n in nodes for _, size in n.gpus] if gpu else [n.memory for n in nodes], default=None)


def workers_of_a_node(nodes: Sequence[NodeFacts], gpu: bool, workers: int, cpus_per_worker: int) -> int:
    """Return how many of the run's workers share the smallest node that can have one, since Ray fills node by node."""
    room = [len(n.gpus) if gpu else n.cpus // cpus_per_worker for n in nodes]
    return max(min([workers, *filter(None, room)]), 1)


def memory(needed: Estimate, nodes: Sequence[NodeFacts], gpu: bool) -> list[Finding]:
    """Compare the estimated peak of one worker with the smallest device.

    gpu: whether the workers run on GPUs; else the smallest node's RAM counts.
    """
    device = device_memory(nodes, gpu)
    if device is None:
        return []
    found = f"{needed.text()}; {gigabytes(device)} on the smallest {'GPU' if gpu else 'node'}"
    if needed.total > device:
        fix = "lower train.micro_batch, or train.activation_checkpointing=true, or train.parallel=fsdp2"
        return [Finding("memory", "failure", found, fix)]
    if needed.total > MEMORY_WARNING * device:
        return [Finding("memory", "warning", found, "close to the limit: halve train.micro_batch")]
    return [Finding("memory", "ok", found)]


def _disk(free: float) -> tuple[Level, str]:
    if free < DISK_WARNING:
        return ("failure" if free < DISK_FAILURE else "warning"), "free some space or use a larger disk"
    return "ok", ""


def _count(nodes: Sequence[NodeFacts]) -> str:
    return "1 node" if len(nodes) == 1 else f"{len(nodes)} nodes"


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version)[:2])


def default_token_file() -> Path:
    """Return the file from which Ray reads the token if RAY_AUTH_TOKEN is not set."""
    return Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
