"""`python -m diffscale.runs [STORAGE]`: the runs of a storage, the one that changed last first."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.table import Table

from diffscale.core import storage
from diffscale.core.app import command_app, run_app
from diffscale.core.console import make_console
from diffscale.core.errors import UserError
from diffscale.training.run_list import list_runs

app = command_app()


@app.command()
def main(
    place: Annotated[str, typer.Argument(metavar="[STORAGE]", help="default: $DIFFSCALE_STORAGE or ~/diffscale")] = "",
) -> None:
    """List the runs of a storage: how far they are and their best values, the newest first."""
    root = storage.resolve(place, "STORAGE") if place else storage.default_storage()
    runs = list_runs(root)
    if not runs:
        raise UserError(setting="STORAGE", value=root, expected="a folder in which runs were trained; it has no run")
    table = Table(box=None, header_style="bold")
    for title, justify in (("run", "left"), ("images", "right"), ("done", "right"), ("best", "left"), ("", "left")):
        table.add_column(title, justify=justify, overflow="fold")  # type: ignore[arg-type]
    for run in runs:
        done = f"{min(run.images_seen / run.budget, 1):.0%}" if run.budget else "?"
        best = f"{run.metric} {run.best:.5g}" if run.best is not None else ""
        name = run.folder.rpartition("/")[2]
        table.add_row(name, f"{run.images_seen:,}", done, best, f"{run.changed.astimezone():%Y-%m-%d %H:%M}")
    make_console(highlight=False).print(table)


if __name__ == "__main__":
    run_app(app)
