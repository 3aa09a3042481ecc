"""Commands run in this process, as `python -m diffscale.NAME` runs them."""

from __future__ import annotations

import contextlib
import io
import sys
from typing import NamedTuple

from diffscale.core.app import load_command, run_app


class Ended(NamedTuple):
    """How a command ended."""

    code: int
    out: str
    err: str


def run_command(name: str, *arguments: str) -> Ended:
    """Run `diffscale NAME ARGUMENTS` to its end. An exception that the command does not explain is raised here."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            run_app(lambda: load_command(name)(args=list(arguments), prog_name=name))
        except SystemExit as end:
            code = int(end.code or 0)
    return Ended(code, out.getvalue(), err.getvalue())


def ray_runs() -> bool:
    """Whether this process has Ray: other tests may have started it, a refused command must not."""
    return "ray" in sys.modules and sys.modules["ray"].is_initialized()
