"""Errors about a dataset's files; each names the shard."""

from __future__ import annotations

from diffscale.core.errors import UserError


class ShardError(UserError):
    """A shard is missing, truncated, altered, replaced or damaged.

    shard: its path or URI
    problem: what is wrong, as a clause ("it is missing")
    position: the first position of the run whose image came from the shard, if known; a checkpoint whose
        `images_seen` is at most this number has seen no image of it
    """

    def __init__(self, shard: str, problem: str, *, position: int | None = None) -> None:
        self.shard, self.problem, self.position = shard, problem, position
        used = "" if position is None else f"; training used it from position {position}"
        resume = "" if position is None else f", and resume at or before {position}"
        super().__init__(
            setting="data.path",
            value=shard,
            expected="the shard described in manifest.json",
            reason=problem + used,
            fix=f"restore it, or rebuild the dataset{resume} (python -m diffscale.data verify lists all damage)",
        )

    def __reduce__(self):
        return _rebuild, (self.shard, self.problem, self.position)


def _rebuild(shard: str, problem: str, position: int | None) -> ShardError:
    return ShardError(shard, problem, position=position)
