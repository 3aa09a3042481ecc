"""The points of a sweep: a grid, random draws, and what every point must satisfy."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import numpy as np
from simpleeval import EvalWithCompoundTypes, InvalidExpression

from diffscale.core.errors import UserError
from diffscale.records.store import identify
from diffscale.sweep.settings import Dimension, Sweep

VARIANT = "variant"

Point = dict[str, Any]


def point_id(point: Mapping[str, Any]) -> str:
    """The same for the same values, whatever their order."""
    return identify(point=dict(point))[:10]


def grid(sweep: Sweep) -> list[Point]:
    """Every combination of the grids and variants, each with `search.samples` draws of the other dimensions, each
    with `replicates` training seeds. The same list for the same sweep, always."""
    axes: dict[str, list[Any]] = {k: d.grid for k, d in sweep.space.items() if d.grid is not None}
    if sweep.variants:
        axes = {VARIANT: list(sweep.variants), **axes}
    drawn = {k: d for k, d in sweep.space.items() if d.grid is None}
    points = []
    for index, values in enumerate(itertools.product(*axes.values())):
        fixed = dict(zip(axes, values, strict=True))
        for sample in range(sweep.search.samples if drawn else 1):
            rng = np.random.default_rng([sweep.search.seed, index, sample])
            points.append(fixed | {key: draw(d, rng) for key, d in drawn.items()})
    return points


def draw(dimension: Dimension, rng: np.random.Generator) -> Any:
    if dimension.choice is not None:
        return dimension.choice[int(rng.integers(len(dimension.choice)))]
    if dimension.uniform is not None:
        return float(rng.uniform(*dimension.uniform))
    assert dimension.loguniform is not None
    low, high = dimension.loguniform
    return float(math.exp(rng.uniform(math.log(low), math.log(high))))


def overrides_of(sweep: Sweep, point: Point) -> dict[str, Any]:
    """The dotted keys that a point sets, its variant's among them."""
    keys = dict(sweep.overrides)
    if VARIANT in point:
        keys |= sweep.variants[point[VARIANT]]
    return keys | {k: v for k, v in point.items() if k != VARIANT}


def nest(dotted: Mapping[str, Any]) -> dict[str, Any]:
    """{"a.b": 1} as {"a": {"b": 1}}."""
    tree: dict[str, Any] = {}
    for key, value in dotted.items():
        *parents, last = key.split(".")
        node = tree
        for part in parents:
            node = node.setdefault(part, {})
            if not isinstance(node, dict):
                raise UserError(setting=f"space.{key}", value=value, expected=f"{part} is set as a whole elsewhere")
        if isinstance(node.get(last), dict) and isinstance(value, dict):
            node[last] |= value
        else:
            node[last] = value
    return tree


def satisfies(constraint: str, settings: Mapping[str, Any]) -> bool:
    """Whether `data.resolution <= 32 or model.name != "unet"` holds for dotted settings. Nothing but comparisons,
    arithmetic and the settings' names can be evaluated (simpleeval)."""
    names = {key: _namespace(value) for key, value in nest(settings).items()}
    try:
        return bool(EvalWithCompoundTypes(names=names, functions={"min": min, "max": max, "abs": abs}).eval(constraint))
    except (InvalidExpression, SyntaxError, TypeError, AttributeError, ArithmeticError, ValueError, KeyError) as error:
        raise UserError(
            setting="constraints", value=constraint, expected=f"a comparison of dotted settings ({error})"
        ) from None


def _namespace(value: Any) -> Any:
    if isinstance(value, dict):
        return SimpleNamespace(**{k: _namespace(v) for k, v in value.items()})
    return value


def label(point: Point) -> str:
    """A point in a few words: the last part of each key and its value."""
    return " ".join(f"{_short_key(k)}={_short(v)}" for k, v in point.items())


def _short_key(key: str) -> str:
    parts = key.split(".")
    return parts[-2] if parts[-1] == "name" and len(parts) > 1 else parts[-1]


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3g}"
    return value if isinstance(value, str) else json.dumps(value, separators=(",", ":"))
