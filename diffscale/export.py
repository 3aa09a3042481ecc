"""`python -m diffscale.export RUN | CHECKPOINT OUT --to diffusers|safetensors`: a model for others to load."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from diffscale.core import storage
from diffscale.core.app import command_app, run_app

app = command_app()


@app.command()
def main(
    target: Annotated[str, typer.Argument(metavar="RUN|CHECKPOINT", help="what to export")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="folder to make")],
    to: Annotated[str, typer.Option(help="diffusers or safetensors")] = "safetensors",
    ema: Annotated[str, typer.Option(help="weights: none, halflife, a power width; default eval.ema")] = "",
    checkpoint: Annotated[str, typer.Option(help="last, or images seen")] = "last",
    licence: Annotated[str, typer.Option(help="of the weights, for the model card, as mit or apache-2.0")] = "",
    push: Annotated[str, typer.Option(help="OWNER/NAME on Hugging Face's hub; HF_TOKEN has the token")] = "",
    private: Annotated[bool, typer.Option("--private", help="if the upload makes a model, only you see it")] = False,
) -> None:
    """Write a run's network with its configuration and a model card."""
    from diffscale.interchange.export import export_run  # import cost
    from diffscale.interchange.import_run import origin  # import cost
    from diffscale.interchange.model_card import NOT_PASSED_ON  # import cost

    place = storage.resolve(target, "RUN")
    folder = export_run(place, out.expanduser().resolve(), to, ema, checkpoint, licence, push, private)
    console = Console()
    console.print(f"exported: {folder}", highlight=False, soft_wrap=True)
    if push:
        console.print(f"uploaded: {push}", highlight=False)
    about = origin(place)
    if about is not None and not about["may_be_passed_on"]:
        console.print(NOT_PASSED_ON, highlight=False, soft_wrap=True)


if __name__ == "__main__":
    run_app(app)
