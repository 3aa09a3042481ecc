"""Evaluation rows as a table for the console."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from rich.table import Table

Row = Mapping[str, Any]
DISTINGUISHING = ("images_seen", "ema", "solver", "nfe", "guidance_scale")


def rows_table(rows: list[dict[str, Any]]) -> Table:
    """Return a table of records or measurements (by column name), with the columns that tell evaluations apart."""
    table = Table(box=None, header_style="bold")
    what = [name for name in DISTINGUISHING if len({r.get(name) for r in rows}) > 1]
    for title in (*what, "metric", "value", "95 % interval", "held out", "n", "against"):
        left = title in ("metric", "ema", "solver")
        table.add_column(title.replace("_", " "), justify="left" if left else "right", no_wrap=title == "metric")
    for r in rows:
        low, high, held = r["value_low"], r["value_high"], r["value_heldout"]
        interval = "" if low is None else f"{low:.4g} .. {high:.4g}"
        cells = [f"{r[name]:,}" if isinstance(r[name], int) else str(r[name]) for name in what]
        cells += [r["metric"], f"{r['value']:.5g}", interval, "" if held is None else f"{held:.5g}"]
        table.add_row(*cells, f"{r['n_generated']:,}", f"{r['n_reference']:,}" if r["n_reference"] else "?")
    return table


def warnings_of(rows: Iterable[Row]) -> list[str]:
    """Return the distinct warnings of the rows, without those of single classes."""
    return sorted({r["warning"] for r in rows if r["warning"] and "[" not in r["metric"]})
