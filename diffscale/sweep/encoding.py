"""A point as Optuna sees it: discrete values as JSON, so that lists, nulls and numbers can be choices."""

from __future__ import annotations

import json
from typing import Any

from diffscale.sweep.settings import Sweep
from diffscale.sweep.space import Point


def encode(sweep: Sweep, point: Point) -> dict[str, Any]:
    return {key: json.dumps(value) if _is_discrete(sweep, key) else value for key, value in point.items()}


def decode(sweep: Sweep, coded: dict[str, Any]) -> Point:
    return {key: json.loads(value) if _is_discrete(sweep, key) else value for key, value in coded.items()}


def point_of(sweep: Sweep, config: dict[str, Any]) -> Point:
    """The point of a trial's configuration: a planned one travels whole, a suggested one by its keys."""
    return json.loads(config["point"]) if "point" in config else decode(sweep, config)


def _is_discrete(sweep: Sweep, key: str) -> bool:
    dimension = sweep.space.get(key)
    return dimension is not None and (dimension.grid or dimension.choice) is not None
