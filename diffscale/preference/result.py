"""What the votes say: strengths with intervals, how consistent raters are, and records next to FID."""

from __future__ import annotations

import itertools
import json
from collections import defaultdict
from dataclasses import dataclass
from datetime import UTC, datetime

import numpy as np
import pandas as pd

from diffscale.core import storage
from diffscale.preference.pairs import NOISE
from diffscale.preference.strengths import Strengths, fit, points
from diffscale.preference.study import Contender, Study
from diffscale.preference.votes import Row, as_votes
from diffscale.records.schema import Record, record_id
from diffscale.records.store import read_records, write_record

METRIC = "preference"
FAILED_CHECKS = 0.25
"""A rater who fails more than this share of the attention checks is marked as inattentive."""


@dataclass(frozen=True)
class Result:
    """The outcome of a study.

    contenders: one row for each, the most preferred first: win_share with interval, votes
    pairs: one row for each pair: the difference of strength with its interval, and the preferred one, if any
    raters: one row for each: votes, failed checks, consistency, whether marked as inattentive
    agreement: share of same answers of two raters to the same pictures, and how many such pairs there were
    """

    contenders: pd.DataFrame
    pairs: pd.DataFrame
    raters: pd.DataFrame
    agreement: tuple[float, int]
    strengths: Strengths


def result(study: Study, without: tuple[str, ...] = ()) -> Result:
    """Return the outcome of the votes so far. without: names of raters whose votes are left out."""
    rows = study.book.read()
    votes = as_votes(rows, without)
    strengths = fit(votes, len(study.contenders), seed=study.seed)
    low, high = (points(strengths.theta + side * strengths.half, strengths.tie) for side in (-1, 1))
    table = pd.DataFrame(
        {
            "contender": study.names,
            "strength": strengths.theta,
            "win_share": strengths.win_share(),
            "win_share_low": low,
            "win_share_high": high,
            "votes": [sum(k in (v.left, v.right) for v in votes) for k in range(len(study.names))],
        }
    ).sort_values("strength", ascending=False, ignore_index=True)
    return Result(table, _pairs(study, strengths, rows, without), _raters(rows), _agreement(rows, without), strengths)


def _pairs(study: Study, strengths: Strengths, rows: dict[str, list[Row]], without: tuple[str, ...]) -> pd.DataFrame:
    votes, found = as_votes(rows, without), []
    for a, b in itertools.combinations(range(len(study.names)), 2):
        difference, low, high = strengths.difference(a, b)
        own = [v for v in votes if {v.left, v.right} == {a, b}]
        preferred = study.names[a] if low > 0 else study.names[b] if high < 0 else ""
        found.append(
            {
                "a": study.names[a],
                "b": study.names[b],
                "difference": difference,
                "difference_low": low,
                "difference_high": high,
                "preferred": preferred,
                "votes": len(own),
                "ties": sum(v.answer == 0 for v in own),
            }
        )
    return pd.DataFrame(found)


def _raters(rows: dict[str, list[Row]]) -> pd.DataFrame:
    found = []
    for rater, own in sorted(rows.items()):
        checks = [row for row in own if row.kind == "check"]
        failed = sum(row.answer != (1 if row.right == NOISE else -1) for row in checks)
        first = {(row.left, row.right, row.item): row.answer for row in own if row.kind == "pair"}
        same = [row.answer == -first[key] for row in own if row.kind == "repeat" and (key := _swapped(row)) in first]
        found.append(
            {
                "rater": rater,
                "votes": len(own) - len(checks),
                "checks": len(checks),
                "failed_checks": failed,
                "inattentive": bool(checks) and failed / len(checks) > FAILED_CHECKS,
                "repeats": len(same),
                "consistency": float(np.mean(same)) if same else np.nan,
                "median_seconds": float(np.median([row.seconds for row in own])) if own else np.nan,
            }
        )
    columns = ["rater", "votes", "checks", "failed_checks", "inattentive", "repeats", "consistency", "median_seconds"]
    return pd.DataFrame(found, columns=columns)


def _swapped(row: Row) -> tuple[int, int, int]:
    return row.right, row.left, row.item


def _agreement(rows: dict[str, list[Row]], without: tuple[str, ...]) -> tuple[float, int]:
    """Return the share of same answers, and the number, of pairs of raters who saw the same two pictures."""
    answers: dict[tuple[int, int, int], dict[str, int]] = defaultdict(dict)
    for rater, own in rows.items():
        for row in own if rater not in without else []:
            if row.kind == "pair":
                low, high = sorted((row.left, row.right))
                answers[low, high, row.item][rater] = row.answer if row.left == low else -row.answer
    same = [a == b for given in answers.values() for a, b in itertools.combinations(given.values(), 2)]
    return (float(np.mean(same)) if same else float("nan")), len(same)


def write_result(study: Study, found: Result) -> list[Record]:
    """Write the tables next to the votes, and a record for every contender that is a run's checkpoint.

    A record is that of the checkpoint's evaluation with another metric: the expected share of points against the
    average contender. `reference` is the study, `n_generated` the number of its votes, `n_reference` that of raters, so
    values of another question, of other contenders or of fewer votes are never compared with it.
    """
    for name in ("contenders", "pairs", "raters"):
        table: pd.DataFrame = getattr(found, name)
        storage.write_bytes(storage.join(study.folder, f"{name}.csv"), table.to_csv(index=False).encode())
    records = []
    for row in found.contenders.to_dict("records") if found.contenders["votes"].any() else []:
        contender = study.contenders[study.names.index(str(row["contender"]))]
        record = _record(study, found, contender, row) if contender.run else None
        if record is not None:
            write_record(contender.run, record)
            records.append(record)
    return records


def _record(study: Study, found: Result, contender: Contender, row: dict) -> Record | None:
    made_by = contender.origin
    base = next(
        (r for r in read_records([contender.run]) if made_by.startswith(f"{r.run_id}/{r.images_seen}/{r.ema}/")), None
    )
    if base is None:
        return None
    group = {
        "sampler": json.dumps({"question": study.question, "layout": study.layout, "items": study.items}),
        "n_generated": int(found.raters["votes"].sum()),
        "n_reference": int((found.raters["votes"] > 0).sum()),
        "reference": study.study_id,
        "metric": METRIC,
        "eval_resolution": max(c.images.shape[1] for c in study.contenders),
    }
    named = {key: value for key, value in group.items() if key != "n_reference"}
    identity = {
        "run_id": base.run_id,
        "images_seen": base.images_seen,
        "ema": base.ema,
        "sample_seed": base.sample_seed,
    }
    values = {
        "record_id": record_id(**identity, **named),  # type: ignore[arg-type]
        "created": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "value": float(row["win_share"]),
        "value_low": float(row["win_share_low"]),
        "value_high": float(row["win_share_high"]),
        "value_heldout": None,
        "value_native": None,
        "memorisation": None,
        "network": "people",
        "resize": "none",
        "warning": "",
    }
    return base.model_copy(update=group | values)
