"""`python -m diffscale.settings [KEY]`: every setting with its type, default and description."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from diffscale.config import describe
from diffscale.config.experiment import Experiment
from diffscale.core.app import command_app, run_app
from diffscale.core.text import write_generated

README = Path(describe.__file__).parent / "README.md"

app = command_app()


@app.command()
def main(
    key: Annotated[str, typer.Argument(metavar="[KEY]", help="a dotted key, or the beginning of several")] = "",
    json_schema: Annotated[bool, typer.Option("--json-schema", help="JSON schema of a settings file")] = False,
    write: Annotated[bool, typer.Option("--write", help="put the table into diffscale/config/README.md")] = False,
) -> None:
    """List every setting with its type, default and description."""
    if json_schema:
        typer.echo(json.dumps(Experiment.model_json_schema(), indent=1))
        return
    if write:
        write_generated(README, "settings", describe.settings_table())
        return
    for setting in describe.find_settings(key) if key else describe.all_settings():
        default = f" = {setting.default}" if setting.default else ""
        typer.echo(f"{setting.key}: {setting.type}{default}")
        if setting.description:
            typer.echo(f"    {setting.description}")


if __name__ == "__main__":
    run_app(app)
