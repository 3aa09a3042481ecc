"""The console on which commands print."""

from __future__ import annotations

import os
import sys
from typing import Any

from rich.console import Console

LOG_WIDTH = 160  # characters of a line in a log file or a job, where rich would assume 80 and cut tables


def make_console(**options: Any) -> Console:
    """Return a console as wide as the terminal; in a log file as $COLUMNS says, or wide enough for tables.

    options: arguments of rich's Console
    """
    known = sys.stdout.isatty() or "COLUMNS" in os.environ
    return Console(**({} if known else {"width": LOG_WIDTH}) | options)
