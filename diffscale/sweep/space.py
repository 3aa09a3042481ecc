"""The points of a sweep: a grid, random draws, the constraints on every point, and a point as Optuna reads it."""

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
from diffscale.core.hashing import identify
from diffscale.sweep.settings import Dimension, Sweep

VARIANT = "variant"

Point = dict[str, Any]


def point_id(point: Mapping[str, Any]) -> str:
    """Return a hash of the values that does not depend on their order."""
    return identify(point=dict(point))[:10]


def grid(sweep: Sweep) -> list[Point]:
    """Return every combination of the variants and grids, each with `search.samples` draws of the other dimensions.

    The list is a function of the sweep alone.
    """
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
    """Return one value of a dimension that is not a grid."""
    if dimension.choice is not None:
        return dimension.choice[int(rng.integers(len(dimension.choice)))]
    if dimension.uniform is not None:
        return float(rng.uniform(*dimension.uniform))
    assert dimension.loguniform is not None
    low, high = dimension.loguniform
    return float(math.exp(rng.uniform(math.log(low), math.log(high))))


def overrides_of(sweep: Sweep, point: Point) -> dict[str, Any]:
    """Return the dotted keys that a point sets, those of its variant included."""
    keys = dict(sweep.overrides)
    if VARIANT in point:
        keys |= sweep.variants[point[VARIANT]]
    return keys | {k: v for k, v in point.items() if k != VARIANT}


def nest(dotted: Mapping[str, Any]) -> dict[str, Any]:
    """Return {"a.b": 1} as {"a": {"b": 1}}. The values are not changed."""
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
            node[last] = dict(value) if isinstance(value, dict) else value  # a later key may add to it
    return tree


def satisfies(constraint: str, settings: Mapping[str, Any]) -> bool:
    """Return whether a constraint such as `data.resolution <= 32 or model.name != "unet"` holds for dotted settings.

    simpleeval evaluates comparisons, arithmetic and the names of settings, nothing else.
    """
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


NEAR_A_BOUND = 0.1
"""Share of a continuous range, of its logarithm if it is log-uniform, that counts as its edge."""


def edges(sweep: Sweep, best: Point) -> list[str]:
    """Return one sentence for each number of the best point that lies at an edge of its range.

    The optimum may lie outside there, so each sentence names the side to extend.
    """
    found = []
    for key, dimension in sweep.space.items():
        value = best.get(key)
        side = None if isinstance(value, bool) or not isinstance(value, int | float) else _side(dimension, float(value))
        if side is not None:
            limit, further = ("smallest", "smaller") if side < 0 else ("largest", "larger")
            found.append(f"{key} = {_short(value)} is best at the {limit} value of its range: try {further} ones too")
    return found


def _side(dimension: Dimension, value: float) -> int | None:
    """Return -1 or 1 if a value lies at the lower or upper edge of its dimension, else None."""
    if (values := dimension.grid or dimension.choice) is not None:
        numbers = [v for v in values if isinstance(v, int | float) and not isinstance(v, bool)]
        if len(numbers) < len(values) or len(set(numbers)) < 2:
            return None
        return -1 if value <= min(numbers) else 1 if value >= max(numbers) else None
    scale = math.log if dimension.loguniform is not None else float
    low, high = (scale(bound) for bound in dimension.loguniform or dimension.uniform or ())
    at = (scale(value) - low) / (high - low)
    return -1 if at < NEAR_A_BOUND else 1 if at > 1 - NEAR_A_BOUND else None


def label(point: Point) -> str:
    """Return a point in a few words: the last part of each key and its value."""
    return " ".join(f"{_short_key(k)}={_short(v)}" for k, v in point.items())


def _short_key(key: str) -> str:
    parts = key.split(".")
    return parts[-2] if parts[-1] == "name" and len(parts) > 1 else parts[-1]


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3g}"
    return value if isinstance(value, str) else json.dumps(value, separators=(",", ":"))


# ---- a point as Optuna reads it: discrete values as JSON, so that lists, nulls and numbers can be choices


def encode(sweep: Sweep, point: Point) -> dict[str, Any]:
    """Return the point with its discrete values as JSON."""
    return {key: json.dumps(value) if _is_discrete(sweep, key) else value for key, value in point.items()}


def decode(sweep: Sweep, coded: dict[str, Any]) -> Point:
    """Return the point that `encode` was given."""
    return {key: json.loads(value) if _is_discrete(sweep, key) else value for key, value in coded.items()}


def point_of(sweep: Sweep, config: dict[str, Any]) -> Point:
    """Return the point of a trial's configuration: a planned point is one JSON value, a suggested one is by key."""
    return json.loads(config["point"]) if "point" in config else decode(sweep, config)


def _is_discrete(sweep: Sweep, key: str) -> bool:
    dimension = sweep.space.get(key)
    return dimension is not None and (dimension.grid or dimension.choice) is not None
