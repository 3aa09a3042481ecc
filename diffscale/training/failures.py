"""Which exceptions of a worker end the run, and which only end this attempt.

Ray Train restarts the workers `train.max_failures` times. That helps against a lost node, not against an error that is
a function of the settings, the data or the program: it comes again at the same position. A UserError, damaged data and
a place that cannot be written end the run at once. Any other exception ends it when it comes a second time with the
same text at the same position, also if another launch met it first. What a lost node causes on the other ranks never
counts.
"""

from __future__ import annotations

import json
import logging
import traceback
from contextlib import suppress

import torch
import torch.distributed as dist

from diffscale.core import storage
from diffscale.core.errors import UserError
from diffscale.core.places import PERMANENT
from diffscale.core.text import one_line
from diffscale.data import ShardError
from diffscale.training.checkpoint.saver import StorageFailed
from diffscale.training.spec import Outcome

log = logging.getLogger(__name__)

FOLDER = "failures"
_OF_ANOTHER_RANK = ("gloo", "nccl", "connection closed by peer", "connection reset", "broken pipe")


def outcome_of(error: Exception, run_folder: str, rank: int, position: int | None) -> Outcome | None:
    """Return the outcome of the run if no further attempt can continue it, else None.

    The error is kept in RUN/failures, with its traceback.

    position: images seen; None before the run was built or resumed
    """
    if isinstance(error, UserError):
        return Outcome("data" if isinstance(error, ShardError) else "refused", error=error.fields())
    if isinstance(error, StorageFailed):
        return Outcome("storage", message=str(error))
    if isinstance(error, OSError) and error.errno in PERMANENT:
        place = f": {error.filename}" if error.filename else ""
        return Outcome("storage", message=f"{error.strerror or error}{place}")
    if _is_transient(error):
        return None
    text = f"{type(error).__name__}: {one_line(error, 400)}"
    uri = storage.join(run_folder, FOLDER, f"rank-{rank}.json")
    met = {"position": position, "error": text}
    before = _read(uri)
    with suppress(OSError):
        told = met | {"traceback": traceback.format_exception(error)}
        storage.write_bytes(uri, json.dumps(told, indent=1).encode())
    if met != before:
        log.warning("rank %d at %s images: %s", rank, position, text)
        return None
    where = "before the first step" if position is None else f"at {position:,} images"
    return Outcome("failed", message=f"twice the same error {where}: {text}; its traceback is in {uri}")


def _is_transient(error: Exception) -> bool:
    """Return whether an error comes from a lost node, a network or a busy store: the next attempt may not meet it."""
    if isinstance(error, torch.OutOfMemoryError):  # the next attempt takes fewer images at a time (training/fit.py)
        return True
    if isinstance(error, dist.DistError) or (isinstance(error, OSError) and not isinstance(error, FileNotFoundError)):
        return True
    if type(error).__module__.partition(".")[0] == "ray":
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(word in text for word in _OF_ANOTHER_RANK)


def _read(uri: str) -> dict[str, object] | None:
    """Return position and text of the error that an earlier attempt of this rank met."""
    try:
        told = json.loads(storage.read_bytes(uri))
        return {"position": told["position"], "error": told["error"]}
    except (OSError, ValueError, KeyError, TypeError):
        return None
