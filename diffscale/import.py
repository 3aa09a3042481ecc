"""`python -m diffscale.import FILE|HUB_ID --family NAME data.path=FOLDER`: published weights as a run.

The run takes the place of one that was trained here: `evaluate`, `sample` and `export` take its folder, and
`train.init_from` begins at its weights. Nothing in the file is executed.
"""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console

from diffscale.core import storage
from diffscale.core.app import command_app, run_app

app = command_app()


@app.command()
def main(
    file: Annotated[
        str,
        typer.Argument(
            metavar="FILE|HUB_ID", help="weights, a folder with config.json, or OWNER/NAME[@REVISION][:FILE]"
        ),
    ],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="dotted settings")] = None,
    family: Annotated[str, typer.Option(help="edm, edm2, adm, iddpm, torchcfm, dit, jit, hdit or diffusers")] = "",
    recipe: Annotated[str, typer.Option(help="whose settings the run has; default: the one that the weights fit")] = "",
    out: Annotated[str, typer.Option(help="folder of the run; default: one under storage")] = "",
) -> None:
    """Make a run of published weights, without running anything that is in their file."""
    from diffscale.interchange.import_run import import_run, imported_from  # import cost

    place = storage.resolve(out, "--out") if out else None
    folder = import_run(file, family, overrides or [], recipe or None, place)
    console, about = Console(), imported_from(folder) or {}
    console.print(f"imported: {folder}", highlight=False, soft_wrap=True)
    console.print(f"recipe {about['recipe']}, licence {about['licence']}", highlight=False, soft_wrap=True)
    if not about["may_be_passed_on"]:
        console.print("the licence does not allow everyone to pass the converted weights on", highlight=False)


if __name__ == "__main__":
    run_app(app)
