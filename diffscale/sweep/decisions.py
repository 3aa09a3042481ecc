"""Which trials go on from a rung: pure functions of values, and the durable record of what was decided."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping

from diffscale.core import storage


def promoted(values: Mapping[str, float], reduction: float, higher_is_better: bool = False) -> set[str]:
    """The best one in `reduction` of the trials, rounded up; not-finite values go last and ties to the smaller name.

    Successive halving (Jamieson & Talwalkar 2016) when `values` holds the whole rung; ASHA's rule (Li et al. 2018)
    when it holds those that have reached it so far.
    """
    sign = -1.0 if higher_is_better else 1.0

    def rank(name: str) -> tuple[float, str]:
        value = values[name]
        return (sign * value if math.isfinite(value) else math.inf, name)

    keep = max(1, math.ceil(len(values) / reduction)) if values else 0
    return {name for name in sorted(values, key=rank)[:keep] if math.isfinite(values[name])}


class Decisions:
    """One immutable file for each (rung, trial): written when the decision is made, never revoked or made again."""

    def __init__(self, folder: str) -> None:
        self.folder = folder

    def _uri(self, rung: int, trial: str) -> str:
        return storage.join(self.folder, "decisions", f"rung-{rung}", f"{trial}.json")

    def get(self, rung: int, trial: str) -> bool | None:
        uri = self._uri(rung, trial)
        return bool(json.loads(storage.read_bytes(uri))["goes_on"]) if storage.exists(uri) else None

    def put(self, rung: int, trial: str, goes_on: bool, value: float) -> bool:
        """Records the decision unless there is one already; returns the one that holds."""
        earlier = self.get(rung, trial)
        if earlier is not None:
            return earlier
        text = json.dumps({"trial": trial, "rung": rung, "goes_on": goes_on, "value": repr(value)})
        storage.write_bytes(self._uri(rung, trial), text.encode())
        return goes_on
