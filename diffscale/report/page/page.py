"""index.html: a self-contained file that uses no network and treats all data as text.

Sample grids that would make it too large are files next to it.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
from collections.abc import Iterable
from importlib import resources
from pathlib import Path

from plotly.offline import get_plotlyjs

from diffscale.report.analysis import Analysis
from diffscale.report.page.page_data import notes, page_data
from diffscale.report.page.samples import find_grids, place_grids

PAGE_BYTES = 14_500_000
"""Largest page, which can be mailed; sample grids that do not fit are files next to it."""
SCRIPTS = ("common.js", "charts.js", "tables.js", "main.js")


def write_page(analysis: Analysis, places: Iterable[str], wanted: list[tuple[str, int]], title: str, out: Path) -> None:
    """Write index.html into the folder `out`. `title` and the records may contain any text.

    places: where sample grids are looked for.
    wanted: (run, images seen) of the grids that it shows, the most important first: as many as fit PAGE_BYTES are in
        the page, the others in pictures/.

    Three things keep it harmless: the JSON cannot end its element, the scripts put text into the page as text, and
    the page's content security policy runs only the two scripts whose hashes it names and reaches no network: of
    files it may fetch images of its own place alone, and only with pictures/.
    """
    assets = resources.files("diffscale.report") / "assets"
    read = {name: (assets / name).read_text(encoding="utf-8") for name in ("index.html", "report.css", *SCRIPTS)}
    plotly, script = get_plotlyjs(), "\n".join(read[name] for name in SCRIPTS)
    data = page_data(analysis)
    used = sum(len(text.encode()) for text in (*read.values(), plotly, to_json(data)))
    grids = place_grids(find_grids(places), wanted, PAGE_BYTES - used, out)
    parts = {
        "HASHES": " ".join(f"'sha256-{_sha256(text)}'" for text in (plotly, script)),
        "PICTURES": "'self' file: " if grids.files else "",  # the first is enough where a server sends the page
        "TITLE": html.escape(title),
        "CSS": read["report.css"],
        "DATA": to_json(data | {"grids": grids.uris, "notes": notes(analysis.rows, grids)}),
        "PLOTLY": plotly,
        "SCRIPT": script,
    }
    page = re.sub("@@([A-Z]+)@@", lambda mark: parts[mark[1]], read["index.html"])
    (out / "index.html").write_text(page, encoding="utf-8")


def to_json(data: object) -> str:
    """Return JSON for a <script> element: without `<`, so neither </script> nor <!-- can end it."""
    return json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")


def _sha256(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
