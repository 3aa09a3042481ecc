"""The tables of preset networks and recipes, and what they cost: `python -m diffscale.models --write README.md`."""

from __future__ import annotations

from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from diffscale.config.recipes import recipes_table, recipes_text
from diffscale.core.app import command_app, run_app
from diffscale.core.text import with_generated
from diffscale.interchange.preset_support import support
from diffscale.models import PRESETS, create_model
from diffscale.models.cost import count_cost

app = command_app()


def table(pattern: str = "*") -> str:
    """Markdown rows of the presets whose name matches a shell pattern. Costs are of one image, on any device."""
    lines = [
        "| preset | backbone | input | trains | weights in | diffusers | parameters | forward GMAC | training GFLOP |",
        "| --- | --- | --- | --- | --- | --- | ---: | ---: | ---: |",
    ]
    for name, preset in PRESETS.items():
        if not fnmatch(name, pattern):
            continue
        side, channels = preset["resolution"], preset.get("channels", 3)
        cost = count_cost(partial(create_model, name), side, channels, preset.get("num_classes", 0))
        can = support(name, cost.parameters)
        lines.append(
            f"| `{name}` | {preset['name']} | {channels} × {side}² | {can.trains} | {can.weights_in} | {can.export} "
            f"| {cost.parameters:,} | {cost.forward_macs / 1e9:,.3f} | {cost.flops_per_image / 1e9:,.3f} |"
        )
    return "\n".join(lines)


@app.command()
def main(
    pattern: Annotated[str, typer.Argument(help="shell pattern of preset names")] = "*",
    write: Annotated[Path | None, typer.Option(help="file whose table between the markers is replaced")] = None,
) -> None:
    """Print the tables of networks and recipes, or write them into a file ("GFLOPs" in papers are mostly our GMAC).

    Of recipes that a pattern chooses all is printed: sampler, assumptions of the price, what differs from the paper.
    """
    rows, recipes = table(pattern), recipes_table(pattern)
    if write is None:
        more = recipes_text(pattern) if pattern != "*" else "diffscale models RECIPE says all about a recipe."
        typer.echo("\n\n".join(filter(None, (rows, recipes, more))))
        return
    try:
        text = with_generated(write.read_text(encoding="utf-8"), "models", rows)
        if "<!-- recipes:begin -->" in text:
            text = with_generated(text, "recipes", recipes)
        write.write_text(text, encoding="utf-8")
    except (OSError, ValueError) as error:
        typer.echo(f"--write = {write}: {error}", err=True)
        raise typer.Exit(2) from None


if __name__ == "__main__":
    run_app(app)
