"""Sample grids for the page: found in run folders, shrunk to what a screen shows, embedded as data URIs."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Iterable
from dataclasses import dataclass, field

from PIL import Image

from diffscale.core import storage

SIDE = 384
"""Longest side in pixels of an embedded grid; the files in the run folders are unchanged."""
_GRID = re.compile(r"-(?P<run>[0-9a-f]{16})/(?:samples/)?images-(?P<images>\d+)\.png$")


@dataclass
class Grids:
    """Embedded sample grids."""

    uris: dict[str, str] = field(default_factory=dict)  # `run_id/images_seen` to a data URI
    left_out: int = 0  # how many did not fit
    damaged: list[str] = field(default_factory=list)  # files that do not open


def find_grids(places: Iterable[str]) -> dict[tuple[str, int], str]:
    """Return the URIs of sample grids by (run_id, images_seen).

    A grid is `NAME-<run_id>/samples/images-XXXXXXXXX.png` in a run's folder and `NAME-<run_id>/images-XXXXXXXXX.png`
    in committed benchmark results.
    """
    found = {}
    for place in places:
        if not place.endswith((".json", ".jsonl")):
            for uri in storage.list_files(place, ".png", recursive=True):
                if match := _GRID.search(uri):
                    found[match["run"], int(match["images"])] = uri
    return found


def embed_grids(found: dict[tuple[str, int], str], wanted: list[tuple[str, int]], budget: int) -> Grids:
    """Embed the wanted grids in their order of importance until `budget` bytes of the page are used.

    A grid that is not a PNG, is damaged or is unreasonably large is named and left out; it does not stop a report.
    """
    grids, used = Grids(), 0
    for key in wanted:
        if key not in found:
            continue
        if used >= budget:
            grids.left_out += 1
            continue
        try:
            uri = _shrink(storage.read_bytes(found[key]))
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
            grids.damaged.append(found[key])
            continue
        used += len(uri)
        grids.uris[f"{key[0]}/{key[1]}"] = uri
    return grids


def _shrink(data: bytes) -> str:
    with Image.open(io.BytesIO(data), formats=["PNG"]) as opened:
        if opened.width * opened.height > 64_000_000:
            raise ValueError(f"{opened.width}×{opened.height} pixels")
        image = opened.convert("RGB")
    image.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    out = io.BytesIO()
    image.save(out, "WEBP", quality=82, method=2)
    return "data:image/webp;base64," + base64.b64encode(out.getvalue()).decode()
