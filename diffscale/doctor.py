"""`python -m diffscale.doctor [PRESET_OR_FILE] [key=value ...]`: checks of a cluster before an expensive run.

Every node is checked: versions, authentication, GPUs and an all-reduce over them, the storage, the dataset, clocks,
disks and shared memory, the weights of the metrics, and the memory that the preset needs. The command prints a table
with a fix for each failure. Exit code 0: no failure (warnings allowed), 1: a check failed, 2: the settings are wrong.
"""

from __future__ import annotations

from typing import Annotated

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from diffscale.config.experiment import Experiment
from diffscale.config.load import load_experiment
from diffscale.core import storage as places
from diffscale.core.app import command_app, run_app
from diffscale.core.console import make_console
from diffscale.preflight.checks import Finding
from diffscale.preflight.examine import examine

app = command_app()
STYLES = {"ok": "green", "warning": "yellow", "failure": "bold red"}


@app.command()
def main(
    preset: Annotated[str | None, typer.Argument(help="preset or YAML file; without it only the cluster")] = None,
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value, as for train")] = None,
    address: Annotated[str | None, typer.Option(help="of the cluster; default $RAY_ADDRESS, else this machine")] = None,
    storage: Annotated[str | None, typer.Option(help="to check without a preset; default $DIFFSCALE_STORAGE")] = None,
) -> None:
    """Check a cluster, and whether a preset will run on it."""
    from diffscale.training.numerics import settled  # import cost

    experiment = load_experiment(preset, overrides or []) if preset else None
    if experiment is not None:
        _refuse_unfit_network(experiment)
    place = experiment.storage if experiment else places.resolve(storage or places.default_storage())
    findings = examine(experiment, place, settled, address)
    show(findings)
    raise typer.Exit(int(any(f.level == "failure" for f in findings)))


def _refuse_unfit_network(experiment: Experiment) -> None:
    """Raise UserError for a network that does not fit the data, before any node is asked.

    Data that cannot be opened here is a finding of `examine`.
    """
    import torch  # import cost

    from diffscale.config.factory import build_model, open_training_data  # import cost

    try:
        dataset = open_training_data(experiment)
    except (OSError, ValueError):
        return
    with torch.device("meta"):
        build_model(experiment, dataset)


def show(findings: list[Finding], console: Console | None = None) -> None:
    """Print the table, failures last so that they stay on the screen, and one line with the verdict."""
    console = console or make_console()
    table = Table(box=box.SIMPLE_HEAD, show_edge=False)
    for column in ("check", "result", "found", "fix"):
        table.add_column(column, overflow="fold")
    for finding in sorted(findings, key=lambda f: list(STYLES).index(f.level)):
        style = STYLES[finding.level]
        table.add_row(finding.check, f"[{style}]{finding.level}[/]", finding.found, finding.fix)
    console.print(table)
    failed = sum(f.level == "failure" for f in findings)
    warned = sum(f.level == "warning" for f in findings)
    console.print(f"{failed} failed, {warned} warnings" if failed or warned else "all checks passed")


if __name__ == "__main__":
    run_app(app)
