"""Damaged versions of a valid file, and a loop that tries them for a given time.

DIFFSCALE_FUZZ_SECONDS: seconds for each reader. The default, 0, is one short round; `.ci/run` takes a few seconds each,
a minute in total; a full run takes 600.
"""

from __future__ import annotations

import os
import time
import traceback
from collections.abc import Callable
from typing import Any

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from diffscale.core.errors import UserError

SECONDS = float(os.environ.get("DIFFSCALE_FUZZ_SECONDS", "0"))

scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=20)
    | st.sampled_from([2**63, -(2**63), 2**1000, 1e308, "nan", "../../etc/passwd", "s3://", "\0", "${a}", "!!x"])
)
anything = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)


@st.composite
def damaged_bytes(draw: st.DrawFn, valid: bytes) -> bytes:
    """A few bytes changed, removed, repeated, inserted, or the end cut off."""
    data = bytearray(valid)
    for _ in range(draw(st.integers(0, 4))):
        at = draw(st.integers(0, len(data)))
        span = draw(st.integers(0, min(64, len(data) - at)))
        kind = draw(st.sampled_from(["flip", "cut", "drop", "repeat", "insert", "zero"]))
        if kind == "flip" and at < len(data):
            data[at] ^= draw(st.integers(1, 255))
        elif kind == "cut":
            del data[at:]
        elif kind == "drop":
            del data[at : at + span]
        elif kind == "repeat":
            data[at:at] = data[at : at + span] * draw(st.integers(1, 50))
        elif kind == "insert":
            data[at:at] = draw(st.binary(max_size=32))
        elif kind == "zero":
            data[at : at + span] = bytes(span)
    return bytes(data)


@st.composite
def damaged_tree(draw: st.DrawFn, valid: dict[str, Any]) -> Any:
    """A JSON-like tree with some values replaced, removed or added, at any depth."""
    import copy

    tree: Any = copy.deepcopy(valid)
    for _ in range(draw(st.integers(0, 3))):
        place, parents = tree, []
        while isinstance(place, (dict, list)) and place and draw(st.booleans() if parents else st.just(True)):
            key = (
                draw(st.sampled_from(sorted(place)))
                if isinstance(place, dict)
                else draw(st.integers(0, len(place) - 1))
            )
            parents.append((place, key))
            place = place[key]
        if not parents:
            return draw(anything)
        holder, key = parents[-1]
        kind = draw(st.sampled_from(["replace", "remove", "add"]))
        if kind == "remove":
            del holder[key]
        elif kind == "add" and isinstance(holder, dict):
            holder[draw(st.text(max_size=12))] = draw(anything)
        else:
            holder[key] = draw(anything)
    return tree


def fuzz(inputs: st.SearchStrategy[Any], read: Callable[[Any], object]) -> int:
    """Call `read` with damaged inputs for SECONDS; return how many. Only success and UserError pass the test."""
    end, rounds, tried = time.monotonic() + SECONDS, 0, 0
    while rounds == 0 or time.monotonic() < end:

        @seed(rounds)
        @settings(
            max_examples=100 if SECONDS else 15,
            database=None,
            deadline=None,
            suppress_health_check=list(HealthCheck),
            phases=[Phase.generate, Phase.shrink],
            report_multiple_bugs=False,
        )
        @given(inputs)
        def one_round(value: Any) -> None:
            nonlocal tried
            tried += 1
            try:
                read(value)
            except UserError as error:
                assert len(error.text().splitlines()) <= 30, "one screen"  # noqa: PT017

        one_round()
        rounds += 1
    return tried


def fuzz_apart(inputs: st.SearchStrategy[Any], read: Callable[[Any], object]) -> None:
    """Run `fuzz` in a separate process, for readers whose native code could crash it."""
    pid = os.fork()
    if pid == 0:
        try:
            fuzz(inputs, read)
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    _, status = os.waitpid(pid, 0)
    assert not os.WIFSIGNALED(status), f"the reader was killed by signal {os.WTERMSIG(status)}"
    assert os.waitstatus_to_exitcode(status) == 0, "see the traceback above"
