"""index.html: one self-contained file that uses no network and treats all data as text."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
from importlib import resources

from plotly.offline import get_plotlyjs

from diffscale.report.analysis import Analysis
from diffscale.report.page.page_data import page_data
from diffscale.report.page.samples import Grids

SCRIPTS = ("common.js", "charts.js", "tables.js", "main.js")


def render(analysis: Analysis, grids: Grids, title: str) -> str:
    """Return the page. `title` and the records may contain any text.

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
    """Return JSON for a <script> element: without `<`, so neither </script> nor <!-- can end it."""
    return json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")


def _sha256(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
