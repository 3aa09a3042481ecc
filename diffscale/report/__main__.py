"""`diffscale report RUNS... --out DIR`, also `python -m benchmarks.report`: quality for compute, from records."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from diffscale.core import storage
from diffscale.core.app import command_app, run_app
from diffscale.core.console import make_console
from diffscale.records.recommendation import read_recommendations
from diffscale.records.store import read_records
from diffscale.report.stats.compare import compare as compare_records
from diffscale.report.stats.compare import regressed
from diffscale.report.stats.recommendations import compare_recommendations
from diffscale.report.write import make_writable, write_report

app = command_app()
SHOWN = 25
"""Rows shown in the terminal; the CSVs have all of them."""


@app.command()
def report(
    runs: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[RUNS]...", help="run folders, folders of runs, record files; default: $DIFFSCALE_STORAGE"
        ),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="folder for the report (default for RUNS: report)")] = None,
    title: Annotated[str, typer.Option(help="heading of index.html")] = "diffscale: quality for compute",
    best_guidance: Annotated[
        bool, typer.Option("--best-guidance", help="compare each checkpoint at its best guidance on held-out images")
    ] = False,
    compare: Annotated[
        tuple[str, str] | None,
        typer.Option(metavar="OLD NEW", help="mark regressions of NEW beyond noise; exit code 1 if there is one"),
    ] = None,
) -> None:
    """Write tables, fits, plots and one page (index.html) from records alone."""
    if compare is None and not runs:
        runs = [storage.default_storage()]
    console = make_console(highlight=False)
    if runs:
        target = out or Path("report")
        analysis = write_report(
            [storage.resolve(run, "RUNS", written=False) for run in runs], target, title, best_guidance
        )
        for finding in analysis.findings[:SHOWN]:
            console.print(Text(f"- {finding['text']}"))
        console.print(
            Text(f"wrote {target}/index.html, plots/ and {', '.join(p.name for p in sorted(target.glob('*.csv')))}")
        )
    if compare is not None:
        raise typer.Exit(_compare(console, *compare, out))


def _compare(console: Console, old: str, new: str, out: Path | None) -> int:
    places = [storage.resolve(place, "--compare", written=False) for place in (old, new)]
    before, after = (read_records([place]) for place in places)
    table = compare_records(before, after)
    promises = compare_recommendations(*(read_recommendations([place]) for place in places))
    if out is not None:
        table.to_csv(make_writable(out) / "compare.csv", index=False, float_format="%.10g", lineterminator="\n")
    shown = Table(
        "verdict", "recipe", "images", "metric", "old", "new", "change", title=f"{len(table):,} points in both"
    )
    for row in table.head(SHOWN).to_dict("records"):
        shown.add_row(
            Text(row["verdict"], style={"regression": "bold red", "costs more": "red"}.get(row["verdict"], "")),
            Text(row["recipe_label"]),
            f"{row['images_seen']:,}",
            Text(row["metric"]),
            _value(row, "old"),
            _value(row, "new"),
            f"{row['change_percent']:+.1f} %",
        )
    console.print(shown)
    for row in promises.to_dict("records"):
        text = f"{row['name']}: {row['old']} -> {row['new']}, loss {row['old_loss']:.4g} -> {row['new_loss']:.4g}"
        console.print(Text(f"{row['verdict']}: recommendation {text} ({row['change_percent']:+.1f} %)"))
    counts = table["verdict"].value_counts()
    console.print(Text(", ".join(f"{name}: {count:,}" for name, count in counts.items())))
    if (table["noise"] == "evaluation").any():
        console.print(Text("No training seed was repeated: intervals hold the noise of the evaluation alone."))
    return int(regressed(table) or (promises["verdict"] == "regression").any())


def _value(row: dict, side: str) -> Text:
    low, high = row[f"{side}_low"], row[f"{side}_high"]
    return Text(f"{row[side]:.4g}" + (f" [{low:.4g}, {high:.4g}]" if low == low else ""))


if __name__ == "__main__":
    run_app(app)
