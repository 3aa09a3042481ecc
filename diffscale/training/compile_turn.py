"""The ranks of a node compile one network: the first one compiles, the others then read the node's cache.

PyTorch keeps what it compiled in the node's temporary folder (TORCHINDUCTOR_CACHE_DIR). Ranks that compile at the same
moment do not find it there, and each starts processes for all cores.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from diffscale.core.cache import file_lock
from diffscale.training.parallel import World


class CompileTurn:
    """The order in which the ranks of a node make their first pass, in which they compile.

    The pass must not wait for other ranks: not where weights are sharded, whose ranks gather them together.
    """

    def __init__(self, world: World, attempt: str) -> None:
        """Have the first rank of each node begin. A collective call.

        attempt: the same on all ranks, and unique to this start of the workers
        """
        self._lock = Path(tempfile.gettempdir(), f"diffscale-compile-{attempt}")
        self._first = world.node_rank == 0
        self._held = ExitStack()
        self._over = world.node_size == 1
        if self._first and not self._over:
            self._held.enter_context(file_lock(self._lock))
        world.barrier()

    @contextmanager
    def taken(self) -> Iterator[None]:
        """Context of a pass: that of a later rank begins when the first rank's first one has ended."""
        if not self._over and not self._first:
            with file_lock(self._lock):
                self._over = True
        yield
        if not self._over:
            self._over = True
            self._lock.unlink(missing_ok=True)
            self._held.close()
