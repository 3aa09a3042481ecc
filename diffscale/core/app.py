"""What every command shares: `diffscale COMMAND`, and errors on one screen without a traceback."""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING

from diffscale.core.errors import EXIT_USER_ERROR, UserError
from diffscale.core.storage import unreachable
from diffscale.core.text import nearest

if TYPE_CHECKING:
    from typer import Typer

COMMANDS = ("train", "tune", "sample", "evaluate", "data", "ema", "doctor", "submit", "quickstart")


def main() -> None:
    """`diffscale COMMAND ...` is `python -m diffscale.COMMAND ...`."""
    command = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if command in ("-h", "--help"):
        print(f"diffscale COMMAND ...   COMMAND is one of {', '.join(COMMANDS)}; each has --help")
        return
    if command not in COMMANDS:
        sys.exit(_show(UserError(setting="COMMAND", value=command, expected=nearest(command, COMMANDS))))
    sys.argv = [f"diffscale {command}", *sys.argv[2:]]
    module = importlib.import_module(f"diffscale.{command}.__main__" if command == "data" else f"diffscale.{command}")
    run_app(module.app)


def run_app(app: Typer) -> None:
    """Runs a typer application; a UserError, or an object store that cannot be reached, prints itself without a
    traceback and exits with code 2."""
    try:
        app()
    except UserError as error:
        sys.exit(_show(error))
    except OSError as error:
        if (explained := unreachable(error)) is None:
            raise
        sys.exit(_show(explained))


def _show(error: UserError) -> int:
    print(f"error: {error.text()}", file=sys.stderr)
    return EXIT_USER_ERROR
