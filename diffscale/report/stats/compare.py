"""Compares two sets of records beyond noise: `--compare OLD NEW`, for continuous integration."""

from __future__ import annotations

from collections.abc import Iterable

import pandas as pd

from diffscale.core.errors import UserError
from diffscale.records.schema import Record, higher_is_better
from diffscale.report.stats.aggregate import aggregate
from diffscale.report.stats.facets import recipe_ids, recipe_settings, to_rows
from diffscale.report.stats.frontier import fair

COLUMNS = [
    "verdict",
    "model",
    "recipe_label",
    "metric",
    "train_resolution",
    "endpoint",
    "images_seen",
    "old",
    "old_low",
    "old_high",
    "old_seeds",
    "new",
    "new_low",
    "new_high",
    "new_seeds",
    "change_percent",
    "noise",
    "flops_per_image_change_percent",
    "facet",
    "recipe",
]
FLOPS_TOLERANCE_PERCENT = 0.5
"""FLOPs are counted, not measured: they have no noise, but torch versions count small operators differently."""


def compare(old: Iterable[Record], new: Iterable[Record]) -> pd.DataFrame:
    """Compare each point (facet, recipe, images_seen) that both sides have. Verdicts, worst first:

    - `regression`: the 95 % intervals do not touch and NEW is worse, or NEW alone diverged (its value is nan).
    - `costs more`: training on one image takes more FLOPs than before.
    - `noise unknown`: one evaluation on each side without an interval; only the change is shown.
    - `improvement`, `same within noise`.

    Intervals include the variance between seeds if either side repeats any (pooled over both), else `noise` says
    `evaluation`. Recipes are matched by the settings that both sides know, so a new setting's default changes nothing.
    Raises UserError if no point is in both.
    """
    rows = pd.concat([to_rows(old).assign(side="old"), to_rows(new).assign(side="new")], ignore_index=True)
    known = [
        {k for settings, endpoint in _settings(part) for k in recipe_settings(settings, endpoint)}
        for _, part in rows.groupby("side")
    ]
    rows["recipe"] = recipe_ids(rows, only=set.intersection(*known) if len(known) == 2 else set())
    pooled = aggregate(rows.assign(recipe=rows["side"] + " " + rows["recipe"]))
    pooled[["side", "recipe"]] = pooled["recipe"].str.split(" ", n=1, expand=True)
    key = ["facet", "recipe", "images_seen"]
    sides = {side: part.set_index(key) for side, part in fair(pooled).groupby("side")}
    both = list(sides["old"].index.intersection(sides["new"].index)) if len(sides) == 2 else []
    if len(both) == 0:
        raise UserError(
            setting="--compare",
            value="OLD NEW",
            expected="records of the same recipe, evaluation group and images_seen on both sides",
            reason="no such pair of records was found",
            fix="evaluate both with the same eval settings, at the same points",
        )
    table = pd.DataFrame([_row(k, sides["old"].loc[k], sides["new"].loc[k]) for k in both], columns=COLUMNS)
    order = {v: i for i, v in enumerate(VERDICTS)}
    return table.sort_values(
        ["verdict", "metric", "recipe_label", "images_seen"],
        key=lambda column: column.map(order) if column.name == "verdict" else column,
        ignore_index=True,
    )


VERDICTS = ("regression", "costs more", "noise unknown", "improvement", "same within noise")


def regressed(table: pd.DataFrame) -> bool:
    """Return whether any point became worse or more expensive."""
    return bool(table["verdict"].isin(["regression", "costs more"]).any())


def _settings(part: pd.DataFrame) -> Iterable[tuple[dict, str]]:
    return part.drop_duplicates(["run_id", "endpoint"])[["settings", "endpoint"]].itertuples(index=False, name=None)


def _row(key: tuple, old: pd.Series, new: pd.Series) -> dict[str, object]:
    flops = 100 * (new["flops_per_image"] / old["flops_per_image"] - 1)
    facet, recipe, images_seen = key
    return {
        "verdict": _verdict(old, new, flops),
        "model": new["model"],
        "recipe_label": new["recipe_label"],
        "metric": new["metric"],
        "train_resolution": new["train_resolution"],
        "endpoint": new["endpoint"],
        "images_seen": images_seen,
        "old": old["value"],
        "old_low": old["value_low"],
        "old_high": old["value_high"],
        "old_seeds": old["seeds"],
        "new": new["value"],
        "new_low": new["value_low"],
        "new_high": new["value_high"],
        "new_seeds": new["seeds"],
        "change_percent": 100 * (new["value"] / old["value"] - 1) if old["value"] else None,
        "noise": new["noise"],
        "flops_per_image_change_percent": flops,
        "facet": facet,
        "recipe": recipe,
    }


def _verdict(old: pd.Series, new: pd.Series, flops_change: float) -> str:
    lost, had = pd.isna(new["value"]), pd.notna(old["value"])
    if lost and had:
        return "regression"
    higher = higher_is_better(new["metric"])
    down, up = new["value_high"] < old["value_low"], new["value_low"] > old["value_high"]
    if down if higher else up:
        return "regression"
    if flops_change > FLOPS_TOLERANCE_PERCENT:
        return "costs more"
    if not had:
        return "same within noise" if lost else "improvement"
    if new["noise"] == "unknown" or old["noise"] == "unknown":
        return "same within noise" if new["value"] == old["value"] else "noise unknown"
    return "improvement" if (up if higher else down) else "same within noise"
