"""`python -m diffscale.recommend DATASET --flops C [key=value ...]`: the recipe for a dataset and a compute.

A share of C searches: learning rates, then sizes of each backbone at budgets well below C. Laws fitted to these runs
choose the network for the rest of C and predict what it gives; `--go` trains it and compares. The same command
continues after any interruption. Exit codes as of `diffscale tune`.
"""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console

from diffscale.config.load import parse_overrides
from diffscale.core.app import command_app, run_app
from diffscale.recommendation.command_line import make_request
from diffscale.recommendation.plan import make_plan
from diffscale.recommendation.run import folder_of, go, is_complete, recommend
from diffscale.recommendation.table import describe_plan, describe_recommendation
from diffscale.sweep.ray_tune import Stopped
from diffscale.training.run import EXIT_STOPPED, resumable_exit_code

app = command_app()


@app.command()
def main(
    dataset: Annotated[str, typer.Argument(metavar="DATASET", help="folder, URI or builtin:emoji")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value; of the search or of every run")] = None,
    flops: Annotated[float | None, typer.Option(help="the whole compute C in training FLOPs")] = None,
    hours: Annotated[float | None, typer.Option(help="or the hours for which the devices are yours")] = None,
    devices: Annotated[int | None, typer.Option(help="number of devices; with --hours. All of this machine")] = None,
    mfu: Annotated[float, typer.Option(help="share of the devices' rate that training reaches, an assumption")] = 0.3,
    device_flops: Annotated[float | None, typer.Option(help="FLOP/s of a device; else measured on this one")] = None,
    price: Annotated[float | None, typer.Option(help="price of a device-hour, in any currency")] = None,
    then_train: Annotated[bool, typer.Option("--go", help="train the recipe with what the search leaves")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="print the plan and its cost; start nothing")] = False,
) -> None:
    """Find the recipe for a dataset and a compute."""
    console = Console()
    request = make_request(
        dataset,
        parse_overrides(overrides or []),
        flops=flops,
        hours=hours,
        devices=devices,
        mfu=mfu,
        device_flops=device_flops,
        price=price,
    )
    plan = make_plan(request)
    console.print(describe_plan(request, plan), highlight=False, soft_wrap=True)
    if dry_run:
        return
    try:
        found = recommend(request, plan, handle_signals=True)
    except Stopped as stopped:
        print(f"stopped; the same command continues the search: {folder_of(request)}", flush=True)
        raise typer.Exit(resumable_exit_code(stopped.signals)) from None
    if then_train and not is_complete(request, found):
        found, result = go(request, found)
        if not result.finished:
            print(f"stopped ({result.reason}); the same command continues: {result.run_folder}", flush=True)
            raise typer.Exit(resumable_exit_code(result.signals) if result.resumable else EXIT_STOPPED)
    console.print(describe_recommendation(found, folder_of(request)), highlight=False, soft_wrap=True)


if __name__ == "__main__":
    run_app(app)
