"""Which trials continue from a rung: a pure function of values, and the durable record of each decision.

Ray Tune's ASHAScheduler does not fit here. It keeps its rungs in the memory of one process and in pickled state, so a
killed sweep would decide again from another subset. Its rungs are counts of iterations, ours are training FLOPs. And
synchronous halving must be a function of the records alone, so that a killed sweep stops the same trials as an
uninterrupted one. The rule itself is three lines.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping

from diffscale.core import storage


def survivors(values: Mapping[str, float], reduction: float, higher_is_better: bool = False) -> set[str]:
    """Return the best 1/`reduction` of the trials, rounded up. Ties go to the smaller name.

    This is successive halving (Jamieson & Talwalkar 2016) if `values` holds the whole rung, and the rule of ASHA
    (Li et al. 2018) if it holds the trials that have reached the rung so far. A value that is not finite never
    survives.
    """
    sign = -1.0 if higher_is_better else 1.0

    def rank(name: str) -> tuple[float, str]:
        value = values[name]
        return (sign * value if math.isfinite(value) else math.inf, name)

    keep = max(1, math.ceil(len(values) / reduction)) if values else 0
    return {name for name in sorted(values, key=rank)[:keep] if math.isfinite(values[name])}


class Decisions:
    """Decisions on disk, one immutable file for each (rung, trial), never revoked."""

    def __init__(self, folder: str) -> None:
        self.folder = folder

    def _uri(self, rung: int, trial: str) -> str:
        return storage.join(self.folder, "decisions", f"rung-{rung}", f"{trial}.json")

    def get(self, rung: int, trial: str) -> bool | None:
        """Return whether the trial continues from the rung; None if that is not decided."""
        uri = self._uri(rung, trial)
        return bool(json.loads(storage.read_bytes(uri))["goes_on"]) if storage.exists(uri) else None

    def put(self, rung: int, trial: str, goes_on: bool, value: float) -> bool:
        """Record the decision unless one exists. Return the valid one."""
        earlier = self.get(rung, trial)
        if earlier is not None:
            return earlier
        text = json.dumps({"trial": trial, "rung": rung, "goes_on": goes_on, "value": repr(value)})
        storage.write_bytes(self._uri(rung, trial), text.encode())
        return goes_on
