"""Facts of one Ray node, gathered on the node in one task. Errors are recorded as text, never raised."""

from __future__ import annotations

import os
import platform
import shutil
import socket
import tempfile
import time
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from diffscale import __version__
from diffscale.core import storage
from diffscale.core.text import one_line

PACKAGES = ("ray", "torch", "pyarrow", "numpy", "timm", "diffscale")


@dataclass(frozen=True)
class ProbeSpec:
    """The places that every node examines. Empty data or metrics are not examined."""

    storage: str
    probe_folder: str  # a new folder under the storage, with the driver's file "driver"
    data_path: str = ""  # resolved: an absolute path or URI
    metrics: tuple[str, ...] = ()


@dataclass
class NodeFacts:
    """The facts of one node. An empty error means that the examination succeeded."""

    node_id: str
    host: str
    versions: dict[str, str] = field(default_factory=dict)  # package -> version, and "python"
    cpus: int = 0
    memory: int = 0  # bytes of RAM
    gpus: list[tuple[str, int]] = field(default_factory=list)  # (name, bytes)
    cuda_error: str = ""
    nccl: str = ""  # version; empty without GPUs
    shared_memory: tuple[int, int] = (0, 0)  # bytes of /dev/shm: total, free
    temporary_free: int = 0  # bytes free where Ray keeps its files
    storage_readable: str = ""  # error
    storage_writable: str = ""  # error
    storage_free: int | None = None  # bytes; None for object stores
    data_hash: str = ""  # content hash
    data_error: str = ""  # error
    metric_errors: dict[str, str] = field(default_factory=dict)  # metric to error


def gather(node_id: str, wanted: ProbeSpec) -> NodeFacts:
    """Return the facts of the node on which this runs."""
    facts = NodeFacts(node_id, socket.gethostname())
    facts.versions = versions()
    facts.cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    facts.memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    _gather_gpus(facts)
    if os.path.isdir("/dev/shm"):
        usage = shutil.disk_usage("/dev/shm")
        facts.shared_memory = usage.total, usage.free
    facts.temporary_free = shutil.disk_usage(tempfile.gettempdir()).free
    _gather_storage(facts, wanted)
    if wanted.data_path:
        _gather_data(facts, wanted.data_path)
    for metric in wanted.metrics:
        facts.metric_errors[metric] = _metric_error(metric)
    return facts


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that nodes and driver must share."""
    return {name: _version(name) for name in PACKAGES} | {"python": platform.python_version()}


def clock() -> float:
    """Return the seconds since 1970 by this node's clock."""
    return time.time()


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        if name == "diffscale":  # the source of a job's working directory, not installed
            return __version__
        return "missing"


def _gather_gpus(facts: NodeFacts) -> None:
    try:
        import torch  # import cost

        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            facts.gpus.append((properties.name, properties.total_memory))
        if facts.gpus:
            torch.ones(8, device="cuda").sum().item()  # fails if driver and CUDA do not match
            facts.nccl = ".".join(map(str, torch.cuda.nccl.version()))
    except Exception as error:
        facts.cuda_error = _short(error)


def _gather_storage(facts: NodeFacts, wanted: ProbeSpec) -> None:
    try:
        storage.read_bytes(storage.join(wanted.probe_folder, "driver"))
    except Exception as error:
        facts.storage_readable = _short(error)
    try:
        if facts.storage_readable and not storage.is_remote(wanted.storage):
            raise OSError("not the driver's folder")  # or this would create a folder of the name on this node
        storage.write_bytes(storage.join(wanted.probe_folder, facts.node_id), facts.host.encode())
        if not storage.is_remote(wanted.storage):
            facts.storage_free = shutil.disk_usage(wanted.probe_folder).free
    except Exception as error:
        facts.storage_writable = _short(error)


def _gather_data(facts: NodeFacts, path: str) -> None:
    from diffscale.data import open_dataset  # import cost

    try:
        dataset: Any = open_dataset(path)
        facts.data_hash = dataset.content_hash
        dataset.gather(_first_and_last(dataset.n))
    except Exception as error:
        facts.data_error = _short(error)


def _first_and_last(n: int) -> Any:
    import numpy as np  # import cost

    return np.array([0, n - 1], dtype=np.int64)


def _metric_error(metric: str) -> str:
    from diffscale.evaluation.metrics.registry import parse_metric  # import cost
    from diffscale.evaluation.networks.extractor import create_extractor  # import cost

    try:
        create_extractor(parse_metric(metric).network, "cpu")
    except Exception as error:
        return _short(error)
    return ""


def _short(error: Exception) -> str:
    return one_line(f"{type(error).__name__}: {error}", 300)
