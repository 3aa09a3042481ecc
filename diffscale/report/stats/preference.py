"""People's preference next to every other metric of the same checkpoints, and how well the orders agree."""

from __future__ import annotations

import numpy as np
import pandas as pd
from scipy import stats

from diffscale.records.schema import higher_is_better
from diffscale.report.stats.aggregate import NORMAL_95

METRIC = "preference"
COLUMNS = [
    "study",
    "votes",
    "raters",
    "recipe_label",
    "run_id",
    "images_seen",
    "ema",
    "preference",
    "preference_low",
    "preference_high",
    "facet",
    "metric",
    "value",
    "value_low",
    "value_high",
]
AGREEMENT = ["study", "votes", "raters", "facet", "metric", "checkpoints", "tau", "tau_low", "tau_high"]
CHECKPOINT = ["run_id", "images_seen", "ema"]
FEWEST = 3  # checkpoints whose orders are compared


def with_metrics(rows: pd.DataFrame) -> pd.DataFrame:
    """Return one row for each checkpoint that people compared and each other metric of it.

    rows: evaluations. Of a study the result with the most votes counts.
    """
    people = rows[rows["metric"] == METRIC]
    most = people.groupby("reference")["n_generated"].transform("max")
    people = people[people["n_generated"] == most].rename(
        columns={
            "reference": "study",
            "n_generated": "votes",
            "n_reference": "raters",
            "value": "preference",
            "value_low": "preference_low",
            "value_high": "preference_high",
        }
    )
    kept = ["study", "votes", "raters", *CHECKPOINT, "preference", "preference_low", "preference_high"]
    others = rows[(rows["metric"] != METRIC) & rows["value"].notna()]  # a diverged checkpoint has no place in an order
    joined = people[kept].merge(others, on=CHECKPOINT, how="inner")
    return joined[COLUMNS].sort_values(
        ["study", "facet", "preference"], ascending=[True, True, False], ignore_index=True
    )


def agreement(joined: pd.DataFrame, draws: int = 2000, seed: int = 0) -> pd.DataFrame:
    """Return Kendall's tau between people's order of the checkpoints and each metric's, best first in both.

    Its 95 % interval is of draws of both values from their intervals. A metric of fewer than three checkpoints is left
    out.
    """
    found, rng = [], np.random.default_rng(seed)
    for (study, facet), part in joined.groupby(["study", "facet"], sort=True):
        if len(part) < FEWEST:
            continue
        sign = 1.0 if higher_is_better(part["metric"].iloc[0]) else -1.0
        people = part["preference"].to_numpy(float)
        values = sign * part["value"].to_numpy(float)
        noise = [
            rng.standard_normal((draws, len(part)))
            * ((part[f"{name}_high"] - part[f"{name}_low"]).fillna(0).to_numpy(float) / (2 * NORMAL_95))
            for name in ("preference", "value")
        ]
        taus = [stats.kendalltau(a, b).statistic for a, b in zip(people + noise[0], values + noise[1], strict=True)]
        low, high = np.nanpercentile(taus, [2.5, 97.5])
        first = part.iloc[0]
        found.append(
            {
                "study": study,
                "votes": first["votes"],
                "raters": first["raters"],
                "facet": facet,
                "metric": first["metric"],
                "checkpoints": len(part),
                "tau": stats.kendalltau(people, values).statistic,
                "tau_low": low,
                "tau_high": high,
            }
        )
    return pd.DataFrame(found, columns=AGREEMENT)
