"""Tables for people and spreadsheets: every evaluation, schedule by resolution, and what a given quality costs."""

from __future__ import annotations

import json
import math

import numpy as np
import pandas as pd

from diffscale.records.schema import higher_is_better
from diffscale.report.stats.facets import CURVE, families, schedule_labels
from diffscale.report.stats.frontier import fair, first_reach, measured, read_at

SWEEP_COLUMNS = [
    "facet",
    "model",
    "dataset",
    "family",
    "family_label",
    "schedule",
    "train_resolution",
    "train_flops",
    "value",
    "value_low",
    "value_high",
    "seeds",
    "best_at_resolution",
    "separated_from_best",
    "final_value",
    "final_low",
    "final_high",
    "final_train_flops",
    "final_images_seen",
]
COST_COLUMNS = [
    "facet",
    "metric",
    "target",
    "model",
    "train_resolution",
    "dataset_hash",
    "recipe",
    "recipe_label",
    "device",
    "devices",
    "train_flops",
    "device_hours",
    "wall_hours",
    "energy_kwh",
    "cost",
    "images_seen",
]


def every_evaluation(rows: pd.DataFrame) -> pd.DataFrame:
    """Return the records unchanged, `settings` and `versions` as JSON, with their facet and recipe."""
    table = rows.drop(columns=["recipe_label"])
    for column in ("settings", "versions", "val_loss_by_logsnr"):
        cache: dict[int, str] = {}
        table[column] = [
            "" if value is None else cache.setdefault(id(value), json.dumps(value, sort_keys=True))
            for value in table[column]
        ]
    return table.sort_values(["facet", "model", "train_flops", "record_id"], ignore_index=True)


def sweep(points: pd.DataFrame) -> pd.DataFrame:
    """Return schedule × resolution for each family of recipes with more than one of either, in each facet.

    The cells of a family differ in schedule and resolution alone. `value` is read at `train_flops`, the largest compute
    that every cell of the family reached, so a 64-pixel and a 16-pixel cell are compared at equal cost. It is empty if
    a cell starts above that compute. `final_*` is the end of each cell.
    """
    points = measured(fair(points))
    if points.empty:
        return pd.DataFrame(columns=SWEEP_COLUMNS)
    recipes = points.drop_duplicates("recipe")
    labels = dict(zip(recipes["recipe"], schedule_labels(recipes), strict=True))
    points = points.assign(_schedule=points["recipe"].map(labels))
    rows: list[dict[str, object]] = []
    for (facet, model, dataset), part in points.groupby(["facet", "model", "dataset"], sort=True):
        own = part.drop_duplicates("recipe")
        ids, names = families(own)
        family_of = dict(zip(own["recipe"], ids, strict=True))
        tables = {}
        for family, cells in part.groupby(part["recipe"].map(family_of), sort=True):
            if cells["_schedule"].nunique() > 1 or cells["train_resolution"].nunique() > 1:
                tables[str(family)] = cells
        for family, cells in tables.items():
            identity = {"facet": facet, "model": model, "dataset": dataset, "family": family}
            rows += _sweep_table(identity | {"family_label": names[family] if len(tables) > 1 else ""}, cells)
    return pd.DataFrame(rows, columns=SWEEP_COLUMNS)


def _sweep_table(identity: dict[str, object], part: pd.DataFrame) -> list[dict[str, object]]:
    higher = higher_is_better(part["metric"].iloc[0])
    by_compute = part.sort_values("train_flops", kind="stable")
    cells = dict(iter(by_compute.groupby(["_schedule", "train_resolution"], sort=True)))
    common = min(cell["train_flops"].iloc[-1] for cell in cells.values())
    rows = []
    for (schedule, resolution), cell in cells.items():
        last, reading = cell.iloc[-1], read_at(cell, common)
        row = identity | {
            "schedule": schedule,
            "train_resolution": resolution,
            "train_flops": common,
            "seeds": last["seeds"],
            "final_value": last["value"],
            "final_low": last["value_low"],
            "final_high": last["value_high"],
            "final_train_flops": last["train_flops"],
            "final_images_seen": last["images_seen"],
        }
        if reading is not None:
            row |= {
                "value": reading.value,
                "value_low": reading.low,
                "value_high": reading.high,
                "known": reading.known,
            }
        rows.append(row)
    for resolution in {row["train_resolution"] for row in rows}:
        _mark_best([r for r in rows if r["train_resolution"] == resolution and "value" in r], higher)
    return rows


def _mark_best(column: list[dict], higher: bool) -> None:
    if not column:
        return
    best = (max if higher else min)(column, key=lambda row: row["value"])
    for row in column:
        row["best_at_resolution"] = row is best
        apart = row["value_high"] < best["value_low"] if higher else row["value_low"] > best["value_high"]
        row["separated_from_best"] = bool(apart and row["known"] and best["known"])


def cost(points: pd.DataFrame, levels: int = 6) -> pd.DataFrame:
    """Return what each recipe spent until it first reached each of a ladder of values.

    A recipe that did not reach a value has empty cells. Costs are interpolated between evaluations (log-log), so
    they are never lower than at the evaluation before.
    """
    rows = []
    for _, part in measured(fair(points)).groupby("facet", sort=True):
        targets = ladder(part["value"].to_numpy(float), levels, higher_is_better(part["metric"].iloc[0]))
        for (*key, recipe), own in part.sort_values("train_flops", kind="stable").groupby([*CURVE, "recipe"]):
            first = {c: own[c].iloc[0] for c in ("recipe_label", "metric", "device", "devices")}
            for target, costs in zip(targets, first_reach(own, targets, _SPENT), strict=True):
                spent = dict(zip(_SPENT, costs, strict=True))
                rows.append(
                    dict(zip(CURVE, key, strict=True))
                    | {"recipe": recipe, "recipe_label": first["recipe_label"], "metric": first["metric"]}
                    | {"device": first["device"], "devices": first["devices"], "target": target}
                    | {"train_flops": spent["train_flops"], "device_hours": spent["device_seconds"] / 3600}
                    | {"wall_hours": spent["device_seconds"] / 3600 / first["devices"], "cost": spent["cost"]}
                    | {"energy_kwh": spent["energy_joules"] / 3.6e6, "images_seen": spent["images_seen"]}
                )
    return pd.DataFrame(rows, columns=COST_COLUMNS).sort_values(
        ["facet", "target", "train_flops", "model", "recipe"], ignore_index=True
    )


_SPENT = ["train_flops", "device_seconds", "energy_joules", "cost", "images_seen"]


def ladder(values: np.ndarray, levels: int, higher: bool = False) -> list[float]:
    """Return values of two digits from the worst to the best that was reached, evenly spaced in the logarithm."""
    values = values[np.isfinite(values)]
    if len(values) == 0:
        return []
    low, high = float(values.min()), float(values.max())
    steps = np.linspace(low, high, levels) if low <= 0 or higher else np.geomspace(low, high, levels)
    return sorted({t for step in steps if low <= (t := _two_digits(float(step), up=not higher)) <= high} or {low})


def _two_digits(value: float, up: bool) -> float:
    """Round towards the easier side, so the best value still counts as reached."""
    if value == 0:
        return 0.0
    unit = 10.0 ** (math.floor(math.log10(abs(value))) - 1)
    return float(f"{(math.ceil if up else math.floor)(round(value / unit, 9)) * unit:.2g}")
