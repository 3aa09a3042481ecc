"""`python -m diffscale.records [--write]`: the table of a record's columns."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from diffscale.core.app import command_app, run_app
from diffscale.core.text import write_generated
from diffscale.records.schema import columns_table

README = Path(__file__).parent / "README.md"

app = command_app()


@app.command()
def main(
    write: Annotated[bool, typer.Option("--write", help="put the table into diffscale/records/README.md")] = False,
) -> None:
    """Print the columns of a record and what they mean."""
    if write:
        write_generated(README, "columns", columns_table())
    else:
        typer.echo(columns_table())


if __name__ == "__main__":
    run_app(app)
