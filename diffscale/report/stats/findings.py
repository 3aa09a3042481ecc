"""The report in sentences: each states its compute and interval, and nothing is claimed within the noise."""

from __future__ import annotations

from collections.abc import Iterator

import pandas as pd

from diffscale.records.guidance import choice_text, choices
from diffscale.records.schema import higher_is_better
from diffscale.report.stats.facets import is_distance, metric_name
from diffscale.report.stats.frontier import fair, measured
from diffscale.report.stats.isoflop import IsoFlop

MOST = 60
"""Largest number of sentences; the tables have the rest."""


def findings(
    facets: pd.DataFrame, points: pd.DataFrame, verdicts: pd.DataFrame, scaling: pd.DataFrame, sweep: pd.DataFrame
) -> list[dict[str, str]]:
    """Return [{facet, kind, text}], the main facet first. kind: best, beats, open, crossing, heldout, tuning."""
    found: list[dict[str, str]] = []
    for facet in facets["facet"]:
        own = measured(fair(points[points["facet"] == facet]))
        if own.empty or not is_distance(own["metric"].iloc[0]) or (len(own) == 1 and len(facets) > 1):
            continue
        sentences = [
            *_best(own),
            *_verdicts(verdicts[verdicts["facet"] == facet], metric_name(str(own["metric"].iloc[0]))),
            *_schedules(sweep[sweep["facet"] == facet]),
            *_crossings(scaling[(scaling["facet"] == facet) & (scaling["kind"] == "crossing")]),
            *_heldout(scaling[(scaling["facet"] == facet) & (scaling["kind"] == "fit")]),
            *_tuning(own),
        ]
        found += [{"facet": facet, "kind": kind, "text": text} for kind, text in sentences]
    return found[:MOST]


def of_losses(table: pd.DataFrame, laws: dict[tuple, IsoFlop]) -> list[dict[str, str]]:
    """Return [{facet, kind, text}]: the best size and loss of each backbone at four times its largest budget."""
    found = []
    for row, law in zip(table.to_dict("records"), laws.values(), strict=True):
        compute = 4 * row["largest_flops"]
        size, loss = law.size([compute])[:, 0], law.loss([compute])[:, 0]
        text = (
            f"{row['model']} at {row['train_resolution']} px, validation loss over sizes and {row['budgets']} budgets: "
            f"with {flops(compute)} FLOPs the best size is {flops(size[0])} parameters [{flops(size[1])}, "
            f"{flops(size[2])}] and the loss {loss[0]:.3g} [{loss[1]:.3g}, {loss[2]:.3g}]."
        )
        if pd.notna(row["heldout_error_percent"]):
            text += f" The largest budget, predicted from the others, was off by {row['heldout_error_percent']:+.1f} %."
        found.append({"facet": "", "kind": "isoflop", "text": text})
    return found


def of_guidance(rows: pd.DataFrame) -> list[dict[str, str]]:
    """Return [{facet, kind, text}]: the best guidance of each checkpoint that was sampled with several."""
    last = rows[rows["images_seen"] == rows.groupby("run_id")["images_seen"].transform("max")]
    distances = last[[is_distance(metric) for metric in last["metric"]]]
    found = []
    for group, best in choices(distances.to_dict("records")):  # type: ignore[arg-type]
        label = f"{group[0]['recipe_label']} after {flops(group[0]['train_flops'])} FLOPs: "
        found.append({"facet": group[0]["facet"], "kind": "guidance", "text": label + choice_text(group, best)})
    return found


def of_people(agreement: pd.DataFrame) -> list[dict[str, str]]:
    """Return [{facet, kind, text}]: how far the order of each distance is that of people."""
    found = []
    for row in agreement.to_dict("records"):
        if is_distance(row["metric"]):
            raters = "1 rater" if row["raters"] == 1 else f"{row['raters']} raters"
            text = (
                f"People's order of {row['checkpoints']} checkpoints ({row['votes']} votes of {raters}) and that by "
                f"{metric_name(row['metric'])}: Kendall's tau {row['tau']:.2f} "
                f"[{row['tau_low']:.2f}, {row['tau_high']:.2f}]."
            )
            found.append({"facet": row["facet"], "kind": "preference", "text": text})
    return found


def number(value: float) -> str:
    return f"{value:.3g}" if abs(value) < 999.5 else f"{value:,.0f}"


def flops(value: float) -> str:
    """Format FLOPs with two digits: `1.2e15`."""
    return f"{value:.2g}".replace("e+", "e")


def _interval(low: float, high: float) -> str:
    return f"[{number(low)}, {number(high)}]" if pd.notna(low) else "[interval unknown]"


def _best(own: pd.DataFrame) -> Iterator[tuple[str, str]]:
    metric = str(own["metric"].iloc[0])
    best = own.sort_values("value", ascending=not higher_is_better(metric)).iloc[0]
    seeds = "1 seed" if best["seeds"] == 1 else f"{best['seeds']} seeds"
    yield (
        "best",
        f"Best {metric_name(metric)}: {number(best['value'])} {_interval(best['value_low'], best['value_high'])} by "
        f"{best['recipe_label']} after {flops(best['train_flops'])} FLOPs ({seeds}, n = {best['n_generated']:,}).",
    )


def _verdicts(table: pd.DataFrame, metric: str) -> Iterator[tuple[str, str]]:
    for row in table[table["verdict"] == "beats"].to_dict("records"):
        read = " (read between evaluations)" if row["interpolated"] else ""
        yield (
            "beats",
            f"{row['model']} beats {row['other']} at {flops(row['train_flops'])} FLOPs, {row['train_resolution']} px: "
            f"{metric} {number(row['value'])} {_interval(row['value_low'], row['value_high'])} against "
            f"{number(row['other_value'])} {_interval(row['other_low'], row['other_high'])}{read}.",
        )
    for verdict, text in (
        ("not separated", "Not separated at their largest common compute"),
        ("one seed each", "No claim, since no training seed was repeated (set replicates)"),
        ("no common compute", "Never at the same compute"),
    ):
        pairs = [
            f"{r['model']} and {r['other']} ({r['train_resolution']} px)"
            for r in table.to_dict("records")
            if r["verdict"] == verdict
        ]
        if pairs:
            yield "open", f"{text}: {', '.join(pairs[:12])}{' ...' if len(pairs) > 12 else ''}."


def _schedules(table: pd.DataFrame) -> Iterator[tuple[str, str]]:
    """Yield the best schedule of each backbone and resolution at equal compute, and which ones are separate from it."""
    columns = ["model", "dataset", "family", "train_resolution"]
    for (model, _, _, side), part in table.dropna(subset=["value"]).groupby(columns, sort=True):
        if len(part) > 1:
            best = part[part["best_at_resolution"].astype(bool)].iloc[0]
            others = part[~part["best_at_resolution"].astype(bool)]
            worse = others.loc[others["separated_from_best"].astype(bool), "schedule"].tolist()
            close = others.loc[~others["separated_from_best"].astype(bool), "schedule"].tolist()
            only = f" ({part['family_label'].iloc[0]})" if part["family_label"].iloc[0] else ""
            text = f"{model}{only}, {side} px, at {flops(best['train_flops'])} FLOPs: {best['schedule']} "
            text += f"{number(best['value'])} {_interval(best['value_low'], best['value_high'])} "
            text += f"beats {', '.join(worse)}" if worse else "is lowest"
            yield "beats" if worse else "open", text + (f"; not separated from {', '.join(close)}." if close else ".")


def _crossings(table: pd.DataFrame) -> Iterator[tuple[str, str]]:
    for row in table.to_dict("records"):
        if row["crossing_probability"] >= 0.5:
            note = f" ({row['note']})" if row["note"] else ""
            yield (
                "crossing",
                f"By the fits, {row['model']} overtakes {row['overtakes']} at {flops(row['crossing_flops'])} FLOPs "
                f"[{flops(row['crossing_low'])}, {flops(row['crossing_high'])}], in "
                f"{100 * row['crossing_probability']:.0f} % of the resamples{note}.",
            )


def _heldout(table: pd.DataFrame) -> Iterator[tuple[str, str]]:
    errors = table["heldout_error_percent"].dropna()
    if len(errors):
        inside = int(table["heldout_inside"].dropna().astype(bool).sum())
        yield (
            "heldout",
            f"How far to trust the fits: predicting each curve's last point from the others was off by "
            f"{errors.abs().median():.0f} % in the median ({errors.abs().max():.0f} % at most); "
            f"{inside} of {len(errors)} lay within the predicted interval.",
        )


def _tuning(own: pd.DataFrame) -> Iterator[tuple[str, str]]:
    spent = own.groupby(["model", "recipe"]).agg(flops=("train_flops", "max"), seeds=("seeds", "max")).reset_index()
    parts = [
        f"{model} {len(part)} ({flops(float((part['flops'] * part['seeds']).sum()))} FLOPs)"
        for model, part in spent.groupby("model", sort=True)
    ]
    if len(parts) > 1:
        yield "tuning", f"Recipes tried for each backbone: {', '.join(parts)}."
