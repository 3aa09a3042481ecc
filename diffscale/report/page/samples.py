"""Sample grids for the page: found in run folders, embedded as data URIs, and beyond a page's size files next to it."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from PIL import Image

from diffscale.core import storage

SIDE = 384
"""Longest side in pixels of an embedded grid; the files in the run folders are unchanged."""
_GRID = re.compile(r"-(?P<run>[0-9a-f]{16})/(?:samples/)?images-(?P<images>\d+)\.png$")


COPIES = 16
"""Grids that are read at once: from an object store each takes 20 to 50 ms."""
PICTURES = "pictures"
Made = TypeVar("Made")


@dataclass
class Grids:
    """Sample grids."""

    uris: dict[str, str] = field(default_factory=dict)  # `run_id/images_seen` to a data URI or a file next to the page
    files: int = 0  # how many are files
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


def place_grids(found: dict[tuple[str, int], str], wanted: list[tuple[str, int]], budget: int, folder: Path) -> Grids:
    """Embed the wanted grids, the most important first, until `budget` bytes of the page are used.

    The others are copied to `folder`/pictures, from where the page fetches those that are looked at. A grid that is not
    a PNG, is damaged or is unreasonably large is named and left out; it does not stop a report.
    """
    grids, used = Grids(), 0
    left = [key for key in wanted if key in found][::-1]
    while left and used < budget:
        run, images = left.pop()
        if uri := _if_sound(_shrink, found[run, images]):
            used += len(uri)
            grids.uris[f"{run}/{images}"] = uri
        else:
            grids.damaged.append(found[run, images])
    if left:
        (folder / PICTURES).mkdir(parents=True, exist_ok=True)

    def copy(key: tuple[str, int]) -> str | None:
        file, data = f"{PICTURES}/{key[0]}-{key[1]}.png", _if_sound(_verified, found[key])
        if data is None:
            return None
        (folder / file).write_bytes(data)
        return file

    with ThreadPoolExecutor(COPIES, thread_name_prefix="grids") as pool:
        for (run, images), file in zip(left[::-1], pool.map(copy, left[::-1]), strict=True):
            if file is None:
                grids.damaged.append(found[run, images])
            else:
                grids.files += 1
                grids.uris[f"{run}/{images}"] = file
    return grids


def _if_sound(use: Callable[[bytes], Made], uri: str) -> Made | None:
    """Return what `use` makes of the file's bytes; None for a damaged one."""
    try:
        return use(storage.read_bytes(uri))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None


def _open(data: bytes) -> Image.Image:
    opened = Image.open(io.BytesIO(data), formats=["PNG"])
    if opened.width * opened.height > 64_000_000:
        raise ValueError(f"{opened.width}×{opened.height} pixels")
    return opened


def _verified(data: bytes) -> bytes:
    """Return a grid unchanged; the checksums of its parts are checked."""
    with _open(data) as opened:
        opened.verify()
    return data


def _shrink(data: bytes) -> str:
    with _open(data) as opened:
        image = opened.convert("RGB")
    image.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    out = io.BytesIO()
    image.save(out, "WEBP", quality=82, method=2)
    return "data:image/webp;base64," + base64.b64encode(out.getvalue()).decode()
