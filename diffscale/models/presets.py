"""Networks by name: the architecture and settings of published ones, and tiny ones for a CPU."""

from __future__ import annotations

from typing import Any

PRESETS: dict[str, dict[str, Any]] = {}
