"""Facets, the groups of comparable values, and recipes, the runs that differ only by their seed.

A *facet* is one comparability group (`GROUP` of records/schema.py) and one kind of endpoint (CONTRIBUTING.md,
decisions 1 and 2). Every frontier, fit, table and plot lies within one facet. A *recipe* is every setting except the
training seed, the place and the length of the run. A *curve* is one backbone at one training resolution on one training
set, over all of its recipes.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Hashable, Iterable, Mapping
from typing import Any

import numpy as np
import pandas as pd

from diffscale.core.hashing import identify
from diffscale.records.guidance import choices, without_guidance
from diffscale.records.schema import GROUP, Record, recipe_of
from diffscale.records.store import to_frame

FACET = [*GROUP, "endpoint"]
CURVE = ["facet", "model", "train_resolution", "dataset_hash"]

NUMBERS = [
    "energy_joules",
    "cost",
    "train_loss",
    "val_loss",
    "value",
    "value_low",
    "value_high",
    "value_heldout",
    "value_native",
    "memorisation",
]

FAIR_ENDPOINTS = ("constant", "inverse_sqrt", "decayed")
"""A checkpoint in the middle of a decay is not the end of a run of that budget: tabulated, never fitted."""

_PRECISION = re.compile(r'"precision":"\w+"')
_SHARED_STATE = '"guidance_state":"shared",'
_LENGTH = re.compile(r"optim\.decay_images")
_OF_A_CELL = ("diffusion.input_scale", "data.resolution")
_DISTANCE = re.compile(r"fid$|fd_|fid_")


def is_distance(metric: str) -> bool:
    """Return whether a metric is a Fréchet distance: positive, with relative noise, and fitted by power laws."""
    return bool(_DISTANCE.match(metric))


def comparable(rows: pd.DataFrame) -> pd.DataFrame:
    """Drop the rows in which no value is better than another: spreads over subsets of the samples (`kid_std`)."""
    return rows[[not str(metric).endswith("_std") for metric in rows["metric"]]] if len(rows) else rows


def metric_name(metric: str) -> str:
    return {"fid": "FID", "kid": "KID"}.get(metric, metric)


def recipe_settings(settings: Mapping[str, object], endpoint: str) -> dict[str, object]:
    """Return the dotted settings that make a recipe: those that change the weights, except seed and length."""
    kept = recipe_of(settings)
    return {k: v for k, v in kept.items() if not (endpoint == "decayed" and _LENGTH.fullmatch(k))}


def to_rows(records: Iterable[Record], best_guidance: bool = False) -> pd.DataFrame:
    """Return one row per evaluation: the record's columns, `facet` and `recipe` (hashes), `recipe_label` (a name).

    best_guidance: keep the best guidance of each checkpoint, chosen on held-out images, and compare these
    """
    rows = to_frame(records)
    if best_guidance and len(rows):
        rows = at_best_guidance(rows)
    if rows.empty:
        return rows.assign(facet=[], recipe=[], recipe_label=[])
    for name in NUMBERS:
        numbers = pd.to_numeric(rows[name], errors="coerce").astype(float)
        rows[name] = numbers.where(np.isfinite(numbers))  # a diverged run has nan, whatever it recorded
    rows["facet"] = groups(rows, FACET)
    rows["recipe"] = recipe_ids(rows)
    rows["recipe_label"] = rows["recipe"].map(_labels(rows))
    return rows


def at_best_guidance(rows: pd.DataFrame) -> pd.DataFrame:
    """Keep of evaluations that differ in guidance alone the best on held-out images; `sampler` then says `own best`.

    A checkpoint whose evaluations have no distance to held-out images keeps them all, each in its own group.
    """
    records = rows.to_dict("records")
    dropped, chosen = set(), set()
    for group, best in choices(records):  # type: ignore[arg-type]
        if best is not None:
            chosen.add(best["record_id"])
            dropped |= {row["record_id"] for row in group if row is not best}
    kept = rows[~rows["record_id"].isin(dropped)]
    own = kept["record_id"].isin(chosen)
    stripped = kept["sampler"].map(lambda text: without_guidance(text)[:-1] + ',"guidance_scale":"own best"}')
    return kept.assign(
        sampler=kept["sampler"].where(~own, stripped), guidance_scale=kept["guidance_scale"].where(~own, 0)
    )


def groups(rows: pd.DataFrame, columns: list[str] = GROUP) -> list[str]:
    """Return a hash per row that is equal for comparable values.

    A sampler's rounding is not part of it, because a group is one solver and its steps: bf16 samples of one network
    are compared with float32 samples of another. Neither is the way in which a network that carries state is guided by
    default: others have no state.
    """
    sampler = rows["sampler"].str.replace(_PRECISION, '"precision":"fp32"', regex=True)
    keys = rows[columns].assign(sampler=sampler.str.replace(_SHARED_STATE, "", regex=False))
    hashes: dict[tuple, str] = {}
    for key in keys.itertuples(index=False, name=None):
        if key not in hashes:
            hashes[key] = identify(**dict(zip(columns, key, strict=True)))[:8]
    return [hashes[key] for key in keys.itertuples(index=False, name=None)]


def recipe_ids(rows: pd.DataFrame, only: set[str] | None = None) -> list[str]:
    """Return the recipe of each row. only: the settings that count, for comparing versions whose settings differ."""
    cache: dict[tuple[object, ...], str] = {}
    ids = []
    columns = ["run_id", "ema", "endpoint", "model", "dataset_hash", "settings"]
    for run_id, ema, endpoint, model, dataset, given in zip(*(rows[c].tolist() for c in columns), strict=True):
        key = (run_id, ema, endpoint, model, dataset)
        if key not in cache:
            kept = {k: v for k, v in recipe_settings(given, endpoint).items() if only is None or k in only}
            cache[key] = identify(model=model, ema=ema, dataset=dataset, endpoint=endpoint, settings=kept)[:8]
        ids.append(cache[key])
    return ids


def _labels(rows: pd.DataFrame) -> dict[str, str]:
    """Return a short name for each recipe: the backbone and at most three settings that set it apart.

    A value that more than half of the recipes share is left out.
    """
    first = rows.drop_duplicates("recipe")
    labels: dict[str, str] = {}
    for (model, _), group in first.groupby(["model", "dataset"], sort=True):
        texts = {
            str(row["recipe"]): {k: _plain(v) for k, v in recipe_settings(row["settings"], row["endpoint"]).items()}
            | {"ema": str(row["ema"]), "endpoint": str(row["endpoint"])}
            for row in group.to_dict("records")
        }
        for recipe, parts in _set_apart(texts).items():
            labels[recipe] = " · ".join([str(model), *parts])
    repeated = {label for label, n in Counter(labels.values()).items() if n > 1}
    return {recipe: f"{label} ({recipe})" if label in repeated else label for recipe, label in labels.items()}


def _set_apart(texts: dict[str, dict[str, str]]) -> dict[str, list[str]]:
    """Return at most three settings by which each tree differs from what more than half of the trees share."""
    keys = sorted(
        {k for tree in texts.values() for k in tree},
        key=lambda k: (k != "data.resolution", not k.endswith(".name"), k),
    )
    usual = {}
    for k in keys:
        value, count = Counter(tree.get(k) for tree in texts.values()).most_common(1)[0]
        if 2 * count > len(texts):
            usual[k] = value
    return {
        name: [_short(k, tree[k]) for k in keys if k in tree and (k not in usual or usual[k] != tree[k])][:3]
        for name, tree in texts.items()
    }


def families(recipes: pd.DataFrame) -> tuple[list[str], dict[str, str]]:
    """Return the family of each recipe, and what sets each family apart from the others ("" for a single one).

    A family is a set of recipes that differ in nothing but the noise schedule and the training resolution.
    """
    trees = [
        {
            k: _plain(v)
            for k, v in recipe_settings(settings, endpoint).items()
            if not (k in _OF_A_CELL or k.startswith("diffusion.schedule."))
        }
        | {"ema": str(ema)}
        for settings, endpoint, ema in zip(recipes["settings"], recipes["endpoint"], recipes["ema"], strict=True)
    ]
    ids = [identify(**tree)[:8] for tree in trees]
    apart = _set_apart(dict(zip(ids, trees, strict=True)))
    return ids, {name: ", ".join(parts) if len(apart) > 1 else "" for name, parts in apart.items()}


def _short(key: str, value: str) -> str:
    if key == "data.resolution":
        return f"{value} px"
    last = key.rpartition(".")[2]
    return value if last in ("name", "endpoint") else f"{last} {value}"


def schedule_labels(table: pd.DataFrame) -> list[str]:
    """Return the noise schedule of each row.

    The label includes the parameters in which the table's schedules of one name differ, and an input scale other
    than 1.
    """
    prefix = "diffusion.schedule."
    given = [
        {k[len(prefix) :]: _plain(v) for k, v in settings.items() if k.startswith(prefix)}
        for settings in table["settings"]
    ]
    seen: dict[tuple[str, str], set[str | None]] = {}
    keys = {key for tree in given for key in tree} - {"name"}
    for name, own in zip(table["schedule"], given, strict=True):
        for key in keys:
            seen.setdefault((name, key), set()).add(own.get(key))
    labels = []
    for name, scale, own in zip(table["schedule"], table["input_scale"], given, strict=True):
        parts = [f"{key} {value}" for key, value in sorted(own.items()) if len(seen.get((name, key), ())) > 1]
        text = f"{name}({', '.join(parts)})" if parts else str(name)
        labels.append(text if scale == 1 else f"{text} · b {_plain(scale)}")
    return labels


def _plain(value: object) -> str:
    if value is None:
        return "none"
    return f"{value:g}" if isinstance(value, int | float) and not isinstance(value, bool) else str(value)


def facet_table(rows: pd.DataFrame) -> pd.DataFrame:
    """Return one row per facet, the most informative first: its columns, `runs`, `evaluations`, `title`."""
    counted = (
        rows.groupby("facet", sort=True)
        .agg(
            _backbones=("model", "nunique"),
            runs=("run_id", "nunique"),
            evaluations=("record_id", "nunique"),
            dataset=("dataset", _joined),
            solver=("solver", "first"),
            nfe=("nfe", "first"),
            guidance_scale=("guidance_scale", "first"),
            **{name: (name, "first") for name in FACET},
        )
        .reset_index()
    )
    unfair = [endpoint not in FAIR_ENDPOINTS for endpoint in counted["endpoint"]]
    other = [not is_distance(metric) for metric in counted["metric"]]
    order = counted.assign(
        _unfair=unfair, _other=other, _alone=counted["runs"] == 1, _proxy=counted["metric"] != "fid"
    ).sort_values(
        ["_unfair", "_other", "_alone", "_proxy", "_backbones", "runs", "evaluations", "n_generated", "facet"],
        ascending=[True, True, True, True, False, False, False, False, True],
    )
    table = order.drop(columns=["_unfair", "_other", "_alone", "_proxy", "_backbones"]).reset_index(drop=True)
    titles = [facet_title(row) for row in table.to_dict("records")]
    repeated = {title for title, n in Counter(titles).items() if n > 1}
    table["title"] = [
        f"{title} (group {facet})" if title in repeated else title
        for title, facet in zip(titles, table["facet"], strict=True)
    ]
    return table


def facet_title(row: Mapping[Hashable, Any]) -> str:
    """Return a caption: the metric, the reference, n, the sampler and the state of the learning rate."""
    scale = row["guidance_scale"]
    guidance = "" if scale == 1 else f", guidance {_plain(scale)}" if scale else ", each at its own best guidance"
    return (
        f"{metric_name(str(row['metric']))} to {row['dataset']} at {row['eval_resolution']}×{row['eval_resolution']}, "
        f"n = {row['n_generated']:,} against {row['n_reference']:,}, {row['solver']} {row['nfe']} NFE{guidance}, "
        f"{str(row['endpoint']).replace('_', ' ')} learning rate"
    )


def _joined(values: pd.Series) -> str:
    return ", ".join(sorted(set(values)))
