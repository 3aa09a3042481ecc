"""What can be wrong with a dataset on disk; each names the shard."""

from __future__ import annotations

from diffscale.core.errors import UserError


class ShardError(UserError):
    """A shard is missing, truncated, altered, replaced or damaged. `shard` is its path or URI.

    `position` is the first position of the run that used it, where that is known: a checkpoint whose `images_seen`
    is at most that has seen nothing of it.
    """

    def __init__(self, shard: str, problem: str, *, position: int | None = None) -> None:
        self.shard, self.problem, self.position = shard, problem, position
        used = "" if position is None else f"; it was used from position {position} on: resume at or before that"
        super().__init__(
            setting="data.path",
            value=shard,
            expected=f"the shard that its manifest.json describes, but {problem}{used}",
            fix="restore the shard, or build the dataset again (python -m diffscale.data verify lists every damage)",
        )

    def __reduce__(self):
        return _rebuild, (self.shard, self.problem, self.position)


def _rebuild(shard: str, problem: str, position: int | None) -> ShardError:
    return ShardError(shard, problem, position=position)
