"""`python -m diffscale.train PRESET_OR_FILE [key=value ...]`: one run, through Ray Train.

The same command resumes the run from the newest good checkpoint; a finished run is reported as finished. Exit codes: 0
finished, 2 a setting is wrong or a place cannot be written, 3 stopped at a good checkpoint because the run cannot
continue (non-finite losses or weights, a damaged shard, a full disk, the same error twice), 143 stopped by SIGTERM or
train.wall_seconds (resumable), 130 after Ctrl-C (also resumable).
"""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console

from diffscale.config.load import load_experiment
from diffscale.core.app import command_app, run_app
from diffscale.training.run import EXIT_STOPPED, resumable_exit_code, train

app = command_app()


@app.command()
def main(
    preset: Annotated[str, typer.Argument(metavar="PRESET_OR_FILE", help="a preset of the package or a YAML file")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="dotted settings")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="print settings and costs; start nothing")] = False,
    replay: Annotated[bool, typer.Option("--replay", help="repeat the batches that were not finite")] = False,
) -> None:
    """Train one run, or resume it."""
    experiment = load_experiment(preset, overrides or [])
    if dry_run:
        from diffscale.training.dry_run import describe  # import cost

        print(describe(experiment, preset))
        return
    if replay:
        from diffscale.training.replay import replay as replay_run  # import cost

        print(replay_run(experiment))
        return
    result, console = train(experiment, handle_signals=True), Console()
    if result.finished:
        console.print(f"finished: {result.images_seen:,} images, {result.run_folder}", highlight=False, soft_wrap=True)
        return
    if result.resumable:
        text = f"stopped at {result.images_seen:,} images; the same command resumes: {result.run_folder}"
        console.print(text, highlight=False, soft_wrap=True)
        raise typer.Exit(resumable_exit_code(result.signals))
    console.print(f"stopped ({result.reason}): {result.message}", highlight=False, soft_wrap=True)
    if result.reason == "nonfinite":
        console.print("the same command with --replay repeats those batches and prints what was not finite")
    raise typer.Exit(EXIT_STOPPED)


if __name__ == "__main__":
    run_app(app)
