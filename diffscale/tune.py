"""`python -m diffscale.tune SWEEP [key=value ...]`: many runs through Ray Tune, compared at equal compute.

Ray Tune places the trials; each trial is a run that resumes from its own folder. The same command continues a sweep
after any kill. Exit codes: 0 all trials ended; 1 some failed; 2 a setting is wrong; 143 SIGTERM and 130 Ctrl-C, after
a checkpoint of every running trial.
"""

from __future__ import annotations

from typing import Annotated

import typer

from diffscale.core.app import command_app, run_app
from diffscale.sweep.ledger import Ledger
from diffscale.sweep.ray_tune import Stopped
from diffscale.sweep.run import load_sweep, planned, run
from diffscale.sweep.space import label
from diffscale.training.run import resumable_exit_code

app = command_app()


@app.command()
def main(
    sweep: Annotated[str, typer.Argument(help="a sweep of the package or a YAML file")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value; of the sweep or of every trial")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="print the trials and start nothing")] = False,
) -> None:
    """Run a sweep, or resume one."""
    ledger = Ledger(load_sweep(sweep, overrides or []))
    if dry_run:
        trials = planned(ledger)
        for trial in trials:
            print(f"{trial.id}  {label(trial.point)}")
        print(f"{len(trials)} trials x {ledger.sweep.replicates} seeds, compared by {ledger.metric}: {ledger.folder}")
        return
    try:
        result = run(ledger, handle_signals=True)
    except Stopped as stopped:
        print(f"stopped; the same command resumes the sweep: {ledger.folder}", flush=True)
        raise typer.Exit(resumable_exit_code(stopped.signals)) from None
    if result.failed:
        raise typer.Exit(1)


if __name__ == "__main__":
    run_app(app)
