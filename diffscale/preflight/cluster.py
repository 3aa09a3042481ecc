"""Runs functions on every node of the connected Ray cluster, each pinned to its node, with a time limit."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from diffscale.preflight.checks import Finding
from diffscale.preflight.node_facts import NodeFacts, ProbeSpec, clock, gather

TIMEOUT = 120.0  # seconds for one node to answer: it imports torch first


def alive_nodes() -> dict[str, str]:
    """Return the host name of every living node, by node id."""
    return {n["NodeID"]: n["NodeManagerHostname"] for n in ray.nodes() if n["Alive"]}


def on_node(node_id: str, function: Callable[..., Any], *arguments: Any, **options: Any) -> ray.ObjectRef:
    """Start a function on one node. It reserves no CPU, so that a busy node answers too."""
    pinned = NodeAffinitySchedulingStrategy(node_id, soft=False)
    wanted: dict[str, Any] = {"num_cpus": 0, "max_retries": 0, "scheduling_strategy": pinned, **options}
    return ray.remote(function).options(**wanted).remote(*arguments)


def gather_all(wanted: ProbeSpec) -> tuple[list[NodeFacts], list[Finding]]:
    """Return the facts of all nodes that answered in time, and a failure for each of the others."""
    hosts = alive_nodes()
    tasks = {node_id: on_node(node_id, gather, node_id, wanted) for node_id in hosts}
    facts, findings, end = [], [], time.monotonic() + TIMEOUT
    for node_id, task in tasks.items():
        try:
            facts.append(ray.get(task, timeout=max(end - time.monotonic(), 1.0)))
        except Exception as error:
            found = f"{hosts[node_id]} did not answer: {_last_line(error)}"
            fix = "look at `ray status` and the node's logs; the job's environment must exist on it"
            findings.append(Finding("nodes", "failure", found, fix))
    return facts, findings


def clock_offsets() -> dict[str, tuple[float, float]]:
    """Return for each host the seconds by which its clock is ahead of this process, and half of the round trip (s).

    Both are of the quickest of five calls.
    """
    hosts, offsets = alive_nodes(), {}
    for node_id, host in hosts.items():
        pinned = NodeAffinitySchedulingStrategy(node_id, soft=False)
        actor: Any = ray.remote(_Clock).options(num_cpus=0, scheduling_strategy=pinned).remote()
        try:
            ray.get(actor.read.remote(), timeout=TIMEOUT)
            readings: list[tuple[float, float]] = []
            for _ in range(5):
                sent = time.time()
                there = ray.get(actor.read.remote(), timeout=TIMEOUT)
                received = time.time()
                readings.append(((received - sent) / 2, there - (sent + received) / 2))
            uncertainty, offset = min(readings)
            offsets[host] = (offset, uncertainty)
        except Exception:  # gather_all names the node that does not answer
            continue
        finally:
            ray.kill(actor)
    return offsets


class _Clock:
    def read(self) -> float:
        return clock()


def all_reduce(gpu: bool) -> Finding:
    """Check addresses, ports and links by one all-reduce.

    gpu: over all GPUs by NCCL; else over one process on each node by gloo.
    """
    backend, name = ("nccl", "NCCL") if gpu else ("gloo", "gloo")
    places = [
        (node["NodeID"], node["NodeManagerAddress"])
        for node in ray.nodes()
        if node["Alive"]
        for _ in range(int(node["Resources"].get("GPU", 0)) if gpu else 1)
    ]
    if not places:
        return Finding("all-reduce", "ok", "no devices to connect")
    first = places[0]
    options = {"num_gpus": 1} if gpu else {}
    try:
        port = ray.get(on_node(first[0], _free_port), timeout=TIMEOUT)
        tasks = [
            on_node(node_id, _sum_of_ones, f"tcp://{first[1]}:{port}", backend, rank, len(places), **options)
            for rank, (node_id, _) in enumerate(places)
        ]
        sums = ray.get(tasks, timeout=TIMEOUT)
    except Exception as error:
        fix = "open all ports between the nodes; choose the interface with NCCL_SOCKET_IFNAME / GLOO_SOCKET_IFNAME"
        return Finding("all-reduce", "failure", f"{name} over {len(places)} processes: {_last_line(error)}", fix)
    if set(sums) != {float(len(places))}:
        return Finding("all-reduce", "failure", f"{name} returned {sums}", "the links corrupt data: test the hardware")
    return Finding("all-reduce", "ok", f"{name} over {len(places)} processes")


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("", 0))
        return s.getsockname()[1]


def _sum_of_ones(address: str, backend: str, rank: int, world_size: int) -> float:
    import torch  # import cost
    import torch.distributed as dist  # import cost

    limit = timedelta(seconds=60)
    dist.init_process_group(backend, init_method=address, rank=rank, world_size=world_size, timeout=limit)
    try:
        ones = torch.ones(1, device="cuda" if backend == "nccl" else "cpu")
        dist.all_reduce(ones)
        return ones.item()
    finally:
        dist.destroy_process_group()


def _last_line(error: Exception) -> str:
    """Return the type and the last line: in an error of a Ray task the cause stands last."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[-1] if lines else ''}"[:200]
