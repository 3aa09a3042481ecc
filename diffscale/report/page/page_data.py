"""The page's data as plain JSON values."""

from __future__ import annotations

import json
import math
from collections import Counter
from itertools import chain
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike

from diffscale.records.schema import Record, higher_is_better
from diffscale.report.analysis import Analysis
from diffscale.report.figures.curves import bands
from diffscale.report.figures.isoflop import fitted_laws, isoflop_caption
from diffscale.report.figures.published import matching
from diffscale.report.figures.recommendation import searched_laws
from diffscale.report.figures.style import looks
from diffscale.report.figures.sweep import NO_COMMON_COMPUTE, nfe_families, nfe_lines, shades
from diffscale.report.page.samples import PICTURES, Grids
from diffscale.report.stats.facets import is_distance, metric_name
from diffscale.report.stats.findings import flops, number
from diffscale.report.stats.frontier import Curve, fair
from diffscale.report.stats.isoflop import parabolas, sizes_around
from diffscale.report.stats.scaling import BEYOND

TABLE = [
    "run_name",
    "model",
    "schedule",
    "train_resolution",
    "seed",
    "images_seen",
    "epochs",
    "train_flops",
    "device_hours",
    "metric",
    "value",
    "value_low",
    "value_high",
    "value_heldout",
    "value_native",
    "memorisation",
    "val_loss",
    "n_generated",
    "eval_resolution",
    "solver",
    "nfe",
    "guidance_scale",
    "ema",
    "endpoint",
    "prediction",
    "weighting",
    "input_scale",
    "parameters",
    "flops_per_image",
    "dataset",
    "device",
    "devices",
    "precision",
    "commit",
    "warning",
]
PRINTED = {
    "run_name",
    "model",
    "schedule",
    "train_resolution",
    "seed",
    "images_seen",
    "train_flops",
    "metric",
    "value",
    "value_low",
    "value_high",
    "n_generated",
    "nfe",
}
"""Columns that fit on paper."""
_POINT = {
    "facet": "facet",
    "recipe": "recipe",
    "recipe_label": "label",
    "model": "model",
    "value": "value",
    "train_resolution": "train_resolution",
    "train_flops": "train_flops",
    "images_seen": "images_seen",
    "epochs": "epochs",
    "cost": "cost",
    "value_low": "low",
    "value_high": "high",
    "value_heldout": "heldout",
    "parameters": "parameters",
    "seeds": "seeds",
    "noise": "noise",
    "nfe": "nfe",
    "solver": "solver",
    "ema": "ema",
    "runs": "runs",
}


def page_data(analysis: Analysis) -> dict[str, Any]:
    """Return what the page's scripts show besides sample grids and notes, as plain JSON values without NaN."""
    rows, points = analysis.rows, analysis.points.reset_index(drop=True)
    higher = {row["facet"]: higher_is_better(str(row["metric"])) for row in analysis.facets.to_dict("records")}
    index = {(p.facet, p.recipe, p.images_seen): i for i, p in enumerate(points.itertuples())}
    return {
        "summary": _summary(rows),
        "looks": {m: {"color": look.color, "symbol": look.symbol} for m, look in looks(points["model"]).items()},
        "facets": [_facet(row, points) for row in analysis.facets.to_dict("records")],
        "points": _points(points, analysis.pareto),
        "curves": [_curve(curve, analysis, index) for curve in analysis.curves],
        "sweep": [
            _sweep(facet, model, part, higher[facet])
            for (facet, model, *_), part in analysis.sweep.groupby(["facet", "model", "dataset", "family"], sort=True)
        ],
        "nfe": [
            {
                "title": family_title,
                "name": metric_name(str(part["metric"].iloc[0])),
                "lines": [
                    [index[k] for k in zip(own["facet"], own["recipe"], own["images_seen"], strict=True)]
                    for own in nfe_lines(part)
                ],
            }
            for family_title, part in nfe_families(points)
        ],
        "isoflop": _isoflops(analysis),
        "published": _published(analysis),
        "findings": analysis.findings,
        "runs": _runs(rows),
        "settings": _settings(rows),
        "table": _table(rows),
    }


def clean(value: object) -> object:
    """Return a JSON value: numpy scalars unwrapped, NaN and infinities as null, floats with 6 digits."""
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value


def _records(table: pd.DataFrame) -> list[dict[str, Any]]:
    return [{str(k): clean(v) for k, v in row.items()} for row in table.to_dict("records")]


def _summary(rows: pd.DataFrame) -> str:
    created = rows["created"].str.slice(0, 10)
    when = created.min() if created.min() == created.max() else f"{created.min()} to {created.max()}"
    return (
        f"{rows['record_id'].nunique():,} evaluations of {rows['run_id'].nunique():,} runs, {when}; "
        f"{flops(float(rows.groupby('run_id')['train_flops'].max().sum()))} training FLOPs in total."
    )


def _facet(row: dict, points: pd.DataFrame) -> dict[str, Any]:
    own = points[points["facet"] == row["facet"]]
    return {
        "facet": row["facet"],
        "title": row["title"],
        "name": metric_name(str(row["metric"])),
        "runs": int(row["runs"]),
        "log": is_distance(str(row["metric"])),
        "higher": higher_is_better(str(row["metric"])),
        "bands": bands(own),
    }


def _points(points: pd.DataFrame, frontier: pd.DataFrame) -> list[dict[str, Any]]:
    table = points[list(_POINT)].rename(columns=_POINT)
    overall = frontier[frontier["scope"] == "overall"]
    best = set(zip(overall["facet"], overall["recipe"], overall["images_seen"], strict=True))
    keys = zip(points["facet"], points["recipe"], points["images_seen"], strict=True)
    return _records(
        table.assign(
            index=range(len(points)),
            device_hours=points["device_seconds"] / 3600,
            frontier=[key in best for key in keys],
            wall_hours=points["device_seconds"] / points["devices"] / 3600,
            energy_kwh=points["energy_joules"] / 3.6e6,
            fair=points.index.isin(fair(points).index),
        )
    )


def _curve(curve: Curve, analysis: Analysis, index: dict) -> dict[str, Any]:
    several = len({c.train_resolution for c in analysis.curves if c.facet == curve.facet}) > 1
    found = analysis.fits.get((curve.facet, curve.model, curve.train_resolution, curve.dataset_hash))
    fit = None
    if found is not None:
        grid = np.geomspace(curve.compute[0], BEYOND * curve.compute[-1], 60)
        low, high = found.interval(grid)
        fit = {
            name: _numbers(values)
            for name, values in (("x", grid), ("y", found.law(grid)[0]), ("low", low), ("high", high))
        }
    keys = zip(curve.points["recipe"], curve.points["images_seen"], strict=True)
    return {
        "facet": curve.facet,
        "model": curve.model,
        "train_resolution": int(curve.train_resolution),
        "dataset_hash": curve.dataset_hash,
        "name": curve.name(several),
        "fit": fit,
        "points": [index[(curve.facet, recipe, images)] for recipe, images in keys],
    }


def _sweep(facet: object, model: object, part: pd.DataFrame, higher: bool) -> dict[str, Any]:
    grid = part.pivot(index="schedule", columns="train_resolution", values="value")
    cells = {(r["schedule"], r["train_resolution"]): r for r in part.to_dict("records")}

    def text(key: tuple) -> str | None:
        cell = cells.get(key)
        if cell is None:
            return None
        if pd.isna(cell["value"]):
            return NO_COMMON_COMPUTE
        known = pd.notna(cell["value_low"])
        interval = f" [{number(cell['value_low'])}, {number(cell['value_high'])}]" if known else ""
        return number(cell["value"]) + interval

    name = " · ".join(part for part in (str(model), str(part["family_label"].iloc[0])) if part)
    return {
        "facet": facet,
        "model": name,
        "schedules": list(grid.index),
        "resolutions": [int(s) for s in grid.columns],
        "shade": [[clean(float(v)) for v in row] for row in shades(grid, higher)],
        "where": f"{name} at {flops(part['train_flops'].iloc[0])} training FLOPs, all other settings equal",
        "text": [[text((schedule, side)) for side in grid.columns] for schedule in grid.index],
    }


def _isoflops(analysis: Analysis) -> list[dict[str, Any]]:
    laws = [*chain.from_iterable(searched_laws(r) for r in analysis.recommendations), *fitted_laws(analysis)]
    return [
        {
            "title": f"{ends['model'].iloc[0]}: {about}",
            "caption": isoflop_caption(law, about),
            "model": str(ends["model"].iloc[0]),
            "sizes": _numbers(sizes_around(ends)),
            "budgets": [
                {
                    "flops": clean(budget.compute),
                    "parameters": _numbers(budget.parameters),
                    "losses": _numbers(budget.losses),
                    "curve": _numbers(law.at(sizes_around(ends), budget.compute)),
                    "best": _numbers(budget.best),
                }
                for budget in parabolas(ends, law)
            ],
        }
        for about, ends, law in laws
    ]


def _numbers(values: ArrayLike) -> list[Any]:
    return [clean(float(value)) for value in np.asarray(values, float)]


def _published(analysis: Analysis) -> list[dict[str, Any]]:
    found = {
        (curve.facet, system)
        for curve in analysis.curves
        for system in matching(curve.metric, str(curve.points["dataset"].iloc[0]), curve.train_resolution)
    }
    marks = [{"facet": facet, "system": s.system, "fid": s.fid, "nfe": s.nfe} for facet, s in found]
    return sorted(marks, key=lambda mark: (mark["facet"], mark["fid"], mark["system"]))


def _runs(rows: pd.DataFrame) -> dict[str, Any]:
    first = rows.drop_duplicates("run_id")
    return {r["run_id"]: {"name": r["run_name"], "seed": clean(r["seed"])} for r in first.to_dict("records")}


def _settings(rows: pd.DataFrame) -> dict[str, Any]:
    """Return the commonest value of each setting, and for each run the settings that differ; values as JSON text."""
    trees = {
        run: {key: json.dumps(value) for key, value in settings.items()}
        for run, settings in rows.drop_duplicates("run_id")[["run_id", "settings"]].itertuples(index=False, name=None)
    }
    keys = sorted({key for tree in trees.values() for key in tree})
    common = {}
    for key in keys:
        values = Counter(tree[key] for tree in trees.values() if key in tree)
        if sum(values.values()) == len(trees):
            common[key] = min(values, key=lambda value: (-values[value], value))
    runs = {run: {k: v for k, v in tree.items() if common.get(k) != v} for run, tree in trees.items()}
    return {"common": common, "runs": runs}


def _table(rows: pd.DataFrame) -> dict[str, Any]:
    table = rows.assign(device_hours=rows["device_seconds"] / 3600)
    described = {name: field.description or "" for name, field in Record.model_fields.items()}
    columns = [c for c in TABLE if not table[c].isna().all() and not (table[c] == "").all()]
    return {
        "columns": columns,
        "numeric": [pd.api.types.is_numeric_dtype(table[c]) for c in columns],
        "descriptions": [described.get(c, "seconds of training x devices / 3600") for c in columns],
        "printed": [c in PRINTED for c in columns],
        "rows": [[clean(v) for v in row] for row in table[columns].itertuples(index=False, name=None)],
        "facets": table["facet"].tolist(),
    }


def notes(rows: pd.DataFrame, grids: Grids) -> list[str]:
    """Return the caveats of the evaluations and of the sample grids, as sentences."""
    found = [
        f"Of {sum(rows['warning'] == text):,} of the {len(rows):,} evaluations: {text}."
        for text in sorted(set(rows["warning"]) - {""})[:20]
    ]
    if rows["dataset_lossy"].any():
        lossy = ", ".join(sorted(set(rows.loc[rows["dataset_lossy"], "dataset"])))
        found.append(f"Made from lossy images (JPEG), which limits the distance that can be reached: {lossy}.")
    if (rows["endpoint"] == "mid_decay").any():
        found.append(
            f"{int((rows['endpoint'] == 'mid_decay').sum()):,} evaluations lie in the middle of a learning-rate decay: "
            "in the table, never in a frontier or fit, since they are not the end of a run of that budget."
        )
    if grids.files:
        found.append(
            f"{grids.files:,} sample grids are fetched from the folder {PICTURES}/ when they are looked at, which "
            "keeps this file small: move that folder with it."
        )
    if grids.damaged:
        more = " ..." if len(grids.damaged) > 5 else ""
        found.append(f"Sample grids that do not open: {', '.join(grids.damaged[:5])}{more}.")
    dirty = int(rows["dirty"].sum())
    if dirty:
        found.append(f"{dirty:,} evaluations were made from uncommitted source.")
    return [
        *found,
        "Made by diffscale from records alone; the CSV files next to this page have everything that it shows.",
    ]
