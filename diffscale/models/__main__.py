"""The table of preset networks and what they cost: `python -m diffscale.models --write README.md`."""

from __future__ import annotations

from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from diffscale.core.app import command_app, run_app
from diffscale.core.text import with_generated
from diffscale.models import PRESETS, create_model
from diffscale.models.cost import count_cost

app = command_app()


def table(pattern: str = "*") -> str:
    """Markdown rows of the presets whose name matches a shell pattern. Costs are of one image, on any device."""
    lines = [
        "| preset | backbone | input | parameters | forward GMAC | training GFLOP |",
        "| --- | --- | --- | ---: | ---: | ---: |",
    ]
    for name, preset in PRESETS.items():
        if not fnmatch(name, pattern):
            continue
        side, channels = preset["resolution"], preset.get("channels", 3)
        cost = count_cost(partial(create_model, name), side, channels, preset.get("num_classes", 0))
        lines.append(
            f"| `{name}` | {preset['name']} | {channels} × {side}² | {cost.parameters:,} "
            f"| {cost.forward_macs / 1e9:,.3f} | {cost.flops_per_image / 1e9:,.3f} |"
        )
    return "\n".join(lines)


@app.command()
def main(
    pattern: Annotated[str, typer.Argument(help="shell pattern of preset names")] = "*",
    write: Annotated[Path | None, typer.Option(help="file whose table between the markers is replaced")] = None,
) -> None:
    """Print the table of presets, or write it into a file ("GFLOPs" in papers are mostly our GMAC)."""
    rows = table(pattern)
    if write is None:
        typer.echo(rows)
        return
    try:
        write.write_text(with_generated(write.read_text(encoding="utf-8"), "models", rows), encoding="utf-8")
    except (OSError, ValueError) as error:
        typer.echo(f"--write = {write}: {error}", err=True)
        raise typer.Exit(2) from None


if __name__ == "__main__":
    run_app(app)
