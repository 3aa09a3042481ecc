"""The records of an object store: fetched in parallel, and kept in an index on this machine's disk.

A record never changes, so what the index has of the same size and time is not fetched again.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from diffscale.core import storage
from diffscale.core.cache import cache_dir
from diffscale.core.hashing import sha256_of

FETCHES = 32  # requests at once: each takes 20 to 50 ms, whatever its size


def fetch_texts(place: str, wanted: Callable[[str], bool]) -> dict[str, bytes]:
    """Return the content of the wanted files under a remote folder by their URIs, in the order of their names.

    wanted: whether the file with a URI is wanted
    """
    states = {uri: state for uri, state in storage.file_states(place).items() if wanted(uri)}
    index = cache_dir() / "records" / f"{sha256_of(place)[:32]}.jsonl"
    known = {uri: text for uri, (state, text) in _read(index).items() if states.get(uri) == state}
    missing = [uri for uri in states if uri not in known]
    if missing:
        with ThreadPoolExecutor(FETCHES, thread_name_prefix="records") as pool:
            fetched = pool.map(storage.read_bytes, missing)
            known |= {uri: data.decode("utf-8", "replace") for uri, data in zip(missing, fetched, strict=True)}
        lines = (json.dumps([uri, states[uri], known[uri]]) + "\n" for uri in sorted(known))
        with suppress(OSError):  # a machine whose cache cannot be written fetches again
            storage.write_bytes(str(index), "".join(lines).encode())
    return {uri: known[uri].encode() for uri in sorted(known)}


def _read(index: Path) -> dict[str, tuple[tuple[int, int], str]]:
    """Return the size and time, and the text, of each file in the index; nothing if it is missing or damaged."""
    try:
        rows = [json.loads(line) for line in index.read_text(encoding="utf-8").splitlines()]
        return {str(uri): ((int(size), int(time)), str(text)) for uri, (size, time), text in rows}
    except (OSError, ValueError, TypeError):
        return {}
