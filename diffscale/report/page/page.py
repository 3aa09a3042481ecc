"""index.html: one file with everything in it, no network, nothing of the user's ever read as markup or script."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
from importlib import resources
from typing import TYPE_CHECKING

from plotly.offline import get_plotlyjs

from diffscale.report.page.page_data import page_data
from diffscale.report.page.samples import Grids

if TYPE_CHECKING:
    from diffscale.report.write import Analysis

SCRIPTS = ("common.js", "charts.js", "tables.js", "main.js")


def render(analysis: Analysis, grids: Grids, title: str) -> str:
    """The whole page. `title` and everything in the records may hold anything.

    Three things keep it harmless: the JSON cannot end its element, the scripts put text into the page as text, and
    the page's content security policy runs only the two scripts whose hashes it names and reaches no network.
    """
    assets = resources.files("diffscale.report") / "assets"
    read = {name: (assets / name).read_text(encoding="utf-8") for name in ("index.html", "report.css", *SCRIPTS)}
    plotly, script = get_plotlyjs(), "\n".join(read[name] for name in SCRIPTS)
    parts = {
        "HASHES": " ".join(f"'sha256-{_sha256(text)}'" for text in (plotly, script)),
        "TITLE": html.escape(title),
        "CSS": read["report.css"],
        "DATA": to_json(page_data(analysis, grids)),
        "PLOTLY": plotly,
        "SCRIPT": script,
    }
    return re.sub("@@([A-Z]+)@@", lambda mark: parts[mark[1]], read["index.html"])


def to_json(data: object) -> str:
    """JSON that can stand in a <script> element: no `<`, so neither </script> nor <!-- can end or change it."""
    return json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")


def _sha256(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
