"""Proof that a local path is the same folder on every node: without it a run's files would be scattered."""

from __future__ import annotations

import os
import shutil
import uuid
from typing import Any

from diffscale.core import storage as places
from diffscale.core.errors import UserError

TIMEOUT = 60.0  # seconds for all nodes to answer


def require_shared(storage: str) -> None:
    """Raise UserError with the names of the nodes that do not see the driver's folder.

    Ray must be connected. A URI and a cluster of one node need no check.
    """
    # Ray reads the variables that connect() sets when it is imported.
    import ray  # import cost

    from diffscale.preflight.cluster import alive_nodes, on_node  # import cost

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
    """Return a node's answer; None if it is lost at this moment, which is no fault of the storage."""
    import ray  # import cost

    try:
        return bool(ray.get(task, timeout=1.0))
    except Exception:
        return None
