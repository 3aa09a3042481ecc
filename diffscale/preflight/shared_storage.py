"""A local path is one place for a run only when every node sees the same folder behind it (DECISIONS 7)."""

from __future__ import annotations

import os
import shutil
import uuid
from typing import Any

from diffscale.core import storage as places
from diffscale.core.errors import UserError

TIMEOUT = 60.0  # seconds for all nodes to answer


def require_shared(storage: str) -> None:
    """Does nothing for a URI or a cluster of one node; else proves, on each node, that the storage is the driver's.

    Ray is connected. Raises UserError that names the nodes which see another folder or none.
    """
    import ray

    from diffscale.preflight.cluster import alive_nodes, on_node

    if places.is_remote(storage):
        return
    nodes = alive_nodes()
    here = ray.get_runtime_context().get_node_id()
    others = {node_id: host for node_id, host in nodes.items() if node_id != here}
    if not others:
        return
    probe = places.join(storage, f".shared-{uuid.uuid4().hex[:12]}")
    try:
        places.write_bytes(places.join(probe, "driver"), b"diffscale")
        seen = {node_id: on_node(node_id, os.path.exists, places.join(probe, "driver")) for node_id in others}
        ray.wait(list(seen.values()), num_returns=len(seen), timeout=TIMEOUT)
        blind = sorted(others[node_id] for node_id, task in seen.items() if _answer(task) is False)
    finally:
        shutil.rmtree(probe, ignore_errors=True)
    if blind:
        raise UserError(
            setting="storage",
            value=storage,
            expected=f"a path visible from every node; missing on: {', '.join(blind)}",
            fix="use s3:// or gs://, or mount one file system at this path on all nodes (python -m diffscale.doctor)",
        )


def _answer(task: Any) -> bool | None:
    """What a node said; None where it did not: a node that is lost at this moment says nothing about the storage."""
    import ray

    try:
        return bool(ray.get(task, timeout=1.0))
    except Exception:
        return None
