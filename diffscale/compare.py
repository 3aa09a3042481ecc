"""`diffscale compare RUNS_OR_FOLDERS...`: people choose between two pictures, blind, on a web page.

The votes are kept under the storage and give each contender a strength with an interval. A run's record gets the metric
`preference`, which the report shows next to FID.
"""

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
    targets: Annotated[list[str], typer.Argument(metavar="RUN|FOLDER...", help="two or more to compare")],
    question: Annotated[str, typer.Option(help="real: which looks more real; label: which fits its label")] = "real",
    layout: Annotated[str, typer.Option(help="pair of images, or grid: two grids of 16")] = "pair",
    n: Annotated[int, typer.Option(help="images of each contender")] = 64,
    resolution: Annotated[int, typer.Option(help="side in pixels to which images of a folder are cropped")] = 0,
    real: Annotated[str, typer.Option(help="dataset or folder whose images take part too")] = "",
    goal: Annotated[int, typer.Option(help="answers that each rater is asked for")] = 60,
    place: Annotated[str, typer.Option("--storage", help="where votes are kept; default: the storage of runs")] = "",
    host: Annotated[str, typer.Option(help="address to listen on; 0.0.0.0 lets other machines in, with the link")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(help="0: any free one")] = 0,
    export: Annotated[str, typer.Option(help="write a page for raters without the server to this file")] = "",
    export_seed: Annotated[int, typer.Option(help="another choice of pairs for another page")] = 0,
    imported: Annotated[list[str] | None, typer.Option("--import", help="file of votes that such a page saved")] = None,
    show: Annotated[bool, typer.Option("--result", help="print the result so far and end")] = False,
    without: Annotated[list[str] | None, typer.Option(help="rater whose votes are left out of the result")] = None,
) -> None:
    """Compare runs or folders of images by people's blind choices."""
    from diffscale.preference.contenders import contender, real_images  # import cost
    from diffscale.preference.export import export_page, import_votes  # import cost
    from diffscale.preference.result import result, write_result  # import cost
    from diffscale.preference.serve import serve  # import cost
    from diffscale.preference.study import Study  # import cost
    from diffscale.preference.table import print_result  # import cost

    console = Console()
    found = []
    for target in targets:
        console.print(f"images of {target}", soft_wrap=True, highlight=False)
        found.append(contender(storage.resolve(target, "RUN|FOLDER", written=False), n, resolution or None))
    truth = (
        real_images(storage.resolve(real, "--real", written=False), n, found[0].labels, resolution or None)
        if real
        else None
    )
    root = storage.resolve(place) if place else storage.default_storage()
    study = Study(found, truth, question=question, layout=layout, place=root)
    study.write()
    for file in imported or []:
        rater, votes = import_votes(study, Path(storage.resolve(file, "--import", written=False)))
        console.print(f"{votes} votes of {rater}")
    if export:
        storage.write_bytes(storage.resolve(export, "--export"), export_page(study, goal, export_seed).encode())
        console.print(f"wrote {export}: send it to a rater, and give the file that comes back to --import")
    if not (show or export or imported):
        serve(study, goal, host, port, lambda link: console.print(f"rate at {link}\n(ctrl-c ends)", soft_wrap=True))
    outcome = result(study, tuple(without or ()))
    records = write_result(study, outcome)
    print_result(console, outcome)
    console.print(f"votes and tables: {study.folder}; {len(records)} records", soft_wrap=True, highlight=False)


if __name__ == "__main__":
    run_app(app)
