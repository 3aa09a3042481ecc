"""The command line: `diffscale COMMAND`, and what every command shares.

A command's module is imported when the command runs, so that help and completion need neither torch nor Ray.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from importlib import util
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from diffscale import __version__
from diffscale.core.errors import EXIT_USER_ERROR, UserError
from diffscale.core.progress import console_display, shown_by
from diffscale.core.text import nearest

COMMANDS = {
    "quickstart": "Run the whole product on this machine, from images to the report, in a few minutes.",
    "data": "Build, inspect or verify an Arrow dataset of images.",
    "settings": "List every setting with its type, default and description.",
    "models": "Print the preset networks and the recipes, and what they cost.",
    "train": "Train one run, or resume it.",
    "import": "Make a run of published weights.",
    "export": "Write a network for others to load, with a model card.",
    "tune": "Run a sweep of runs, or resume it.",
    "recommend": "Find the recipe for a dataset and a compute, with a promise that can be checked.",
    "sample": "Generate images from a run or a checkpoint.",
    "evaluate": "Evaluate a run, a checkpoint or a folder of images.",
    "ema": "Make weights with another EMA width after training.",
    "runs": "List the runs of a storage: how far they are and their best values.",
    "compare": "Let people choose between the pictures of runs, blind, on a web page.",
    "report": "Make tables, fits, plots and one page from records.",
    "doctor": "Check every node of the cluster before a long run.",
    "submit": "Run a command as a job of a Ray cluster.",
}
"""Commands in the order in which help lists them, with one line about each."""


PLAIN: dict[str, Any] = {"pretty_exceptions_enable": False, "rich_markup_mode": None}
"""One style of help and errors for every command: text that a log and `grep` can take."""


class LazyCommands(TyperGroup):
    """Commands that are listed from `COMMANDS` and imported when they run."""

    def list_commands(self, ctx: Any) -> list[str]:
        """Return the names of the commands in the order of `COMMANDS`."""
        return list(COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """Return what help and completion show of a command, without importing its module."""
        if cmd_name not in COMMANDS:
            return None
        return TyperCommand(cmd_name, short_help=COMMANDS[cmd_name])  # a short help is wrapped, a help is cut

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Return the command that the first argument names. Raises UserError with the nearest name."""
        name = args[0]
        if name not in COMMANDS and not ctx.resilient_parsing and not name.startswith("-"):
            raise UserError(setting="COMMAND", value=name, expected=nearest(name, COMMANDS))
        if name not in COMMANDS:
            return super().resolve_command(ctx, args)
        return name, load_command(name), args[1:]


def load_command(name: str) -> Any:
    """Import the module of a command and return its application as a command."""
    module = f"diffscale.{name}"
    spec = util.find_spec(module)
    if spec is not None and spec.submodule_search_locations is not None:
        module += ".__main__"
    return typer.main.get_command(importlib.import_module(module).app)


def command_app(**options: Any) -> typer.Typer:
    """Return the typer application of one command. options: arguments of `typer.Typer`."""
    return typer.Typer(**{"add_completion": False, **PLAIN, **options})


app = typer.Typer(cls=LazyCommands, no_args_is_help=True, **PLAIN)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"diffscale {__version__}")
        raise typer.Exit


@app.callback()
def diffscale(
    version: Annotated[
        bool, typer.Option("--version", help="print the version", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Which backbone, noise schedule and resolution give the best images for your compute?"""


def main() -> None:
    """Run `diffscale COMMAND ...`, which is `python -m diffscale.COMMAND ...`."""
    run_app(lambda: app(prog_name="diffscale"))


def run_app(application: Callable[[], Any]) -> None:
    """Run a typer application and show the progress of its work.

    A UserError, an unreachable object store, and a place that cannot be written or is no folder are printed without a
    traceback; the exit code is then 2.
    """
    try:
        with shown_by(console_display()):
            application()
    except UserError as error:
        sys.exit(_show(error))
    except OSError as error:
        from diffscale.core.places import explain  # import cost

        if (explained := explain(error)) is None:
            raise
        sys.exit(_show(explained))


def _show(error: UserError) -> int:
    print(f"error: {error.text()}", file=sys.stderr)
    return EXIT_USER_ERROR
