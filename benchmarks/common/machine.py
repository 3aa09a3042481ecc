"""What made a measurement: machine, date, commit and command."""

from __future__ import annotations

import os
import platform
import sys
import time
from pathlib import Path
from typing import Any

from diffscale.core.provenance import source


def made_by() -> dict[str, Any]:
    """Return machine, date, commit and command of a measurement."""
    commit, dirty = source()
    module = getattr(sys.modules["__main__"].__spec__, "name", sys.argv[0]).removesuffix(".__main__")
    return {
        "machine": f"{os.cpu_count()} cores of {cpu_name()}",
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "commit": f"{commit[:12]}{'+' if dirty else ''}",
        "command": " ".join(["python -m", module, *sys.argv[1:]]),
    }


def cpu_name() -> str:
    """Return the name of the processor, or its architecture if Linux does not know the name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
