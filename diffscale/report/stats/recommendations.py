"""What a recommendation says to a person who must spend the compute, and how its predictions fared."""

from __future__ import annotations

import numpy as np
import pandas as pd

from diffscale.records.recommendation import Prediction, Recommendation, Searched
from diffscale.report.stats.findings import flops, number
from diffscale.report.stats.isoflop import IsoFlop
from diffscale.report.stats.predictions import backtest, loss_law

LIANG = {"parameters": 0.568, "images": 0.432}
"""Exponents of the best size and of the data of diffusion transformers (Liang et al., arXiv 2410.08184)."""
WIDEST = 0.5
"""Width of an exponent's interval above which it is not compared with another."""
COLUMNS = ["name", "dataset", "backbone", "quantity", "flops", "predicted", "low", "high", "measured", "error_percent"]


def fared(recommendations: list[Recommendation]) -> pd.DataFrame:
    """Return a row for each predicted quantity: its interval, what was measured, and the error; inside is bool."""
    rows = []
    for r in recommendations:
        for quantity, predicted, measured in _quantities(r):
            row = [r.name, r.dataset, r.recipe.backbone, quantity, r.recipe.flops, *predicted.numbers, measured]
            rows.append([*row, 100 * (predicted.value / measured - 1), predicted.low <= measured <= predicted.high])
    table = pd.DataFrame(rows, columns=[*COLUMNS, "inside"])
    known = table["measured"].notna()
    return table.assign(inside=table["inside"].where(known))


def _quantities(r: Recommendation) -> list[tuple[str, Prediction, float]]:
    o = r.outcome
    found = [("validation loss", r.recipe.val_loss, np.nan if o is None else o.val_loss)]
    if r.recipe.distance is not None:
        found.append((r.metric, r.recipe.distance, np.nan if o is None else o.distance))
    return found


def of_recommendations(recommendations: list[Recommendation]) -> list[dict[str, str]]:
    """Return [{facet, kind, text}]: what to train, what it gives, and how far to trust that."""
    found = []
    for r in recommendations:
        found.append({"facet": "", "kind": "recommendation", "text": advice(r)})
        found.append({"facet": "", "kind": "trust", "text": trust(r)})
        part = next(p for p in r.searched if p.backbone == r.recipe.backbone)
        law = loss_law(part)
        if law is not None:
            found.append({"facet": "", "kind": "exponents", "text": exponents(part, law)})
    return found


def advice(r: Recommendation) -> str:
    """Return what to train, in a paragraph."""
    recipe, o = r.recipe, r.outcome
    price = "" if recipe.cost is None else f", {number(recipe.cost)} at the stated price"
    text = (
        f"For {r.dataset} at {r.resolution} px and {flops(r.flops)} FLOPs train {recipe.backbone} of "
        f"{recipe.parameters:,} parameters on {recipe.images:,} images ({number(recipe.epochs)} epochs): "
        f"{flops(recipe.flops)} FLOPs, {number(recipe.device_seconds / 3600)} device-hours{price}. "
        f"Predicted validation loss {recipe.val_loss}"
    )
    if recipe.distance is not None:
        text += f", {r.metric} {recipe.distance}"
    if o is None:
        return text + ". Train it with diffscale train recipe.yaml, which is in the recommendation's folder."
    text += f". It came out as {o.val_loss:.4g}" + (
        f" and {number(o.distance)}." if recipe.distance is not None else "."
    )
    if o.guidance is None:
        return text
    g = o.guidance
    return text + (
        f" Sample with {g}, the best of {', '.join(g.heldout)} on held-out images: {r.metric} {number(g.distance)} at "
        f"{g.nfe} network evaluations and {flops(g.sampling_flops)} FLOPs an image."
    )


def trust(r: Recommendation) -> str:
    """Return how far to trust the advice, in a paragraph."""
    rest = [line for line in r.recipe.why[1:] if "separated" in line or "worse" in line]
    text = f"How far to trust it: the search used {r.search_flops / r.flops:.0%} of the compute. "
    for row in fared([r]).dropna(subset=["measured"]).to_dict("records"):
        where = "inside" if row["inside"] else "outside"
        text += f"The {row['quantity']} was predicted with {row['error_percent']:+.1f} %, {where} the interval. "
    tested = backtest(next(p for p in r.searched if p.backbone == r.recipe.backbone))
    if tested is None:
        text += "A law needs three budgets, so none was left to test it on. "
    else:
        where = "inside" if tested[1] else "outside"
        text += f"From the smaller budgets it predicts the largest with {tested[0]:+.1f} %, {where} the interval. "
    if r.chosen:
        text += f"Of schedules and resolutions {r.chosen} was best; predictions are for the settings of the search. "
    return text + " ".join([*rest, *r.recipe.caveats])


def exponents(part: Searched, law: IsoFlop) -> str:
    """Return the exponents next to those of the paper, or why they are not compared."""
    found, texts = law.exponents(), []
    for key, what in (("parameters", "The best size"), ("images", "the images it sees")):
        value, low, high = found[key]
        text = f"{what} grow{'s' if key == 'parameters' else ''} with compute to the power {value:.2f} "
        text += f"[{low:.2f}, {high:.2f}]"
        if high - low > WIDEST:
            text += ", too wide to compare"
        else:
            agrees = "agrees with" if low <= LIANG[key] <= high else "differs from"
            text += f", which {agrees} {LIANG[key]:.2f}"
        texts.append(text)
    return (
        f"{part.backbone}: {'; '.join(texts)}. Liang et al. (arXiv 2410.08184) found {LIANG['parameters']:.2f} and "
        f"{LIANG['images']:.2f} for text-to-image transformers on latents, at 1e17 to 6e18 FLOPs."
    )


def compare_recommendations(old: list[Recommendation], new: list[Recommendation]) -> pd.DataFrame:
    """Return a row for each recommendation of both sides, matched by name, data and compute.

    The verdict compares what came true, or what is predicted where a side was not trained: `regression` if NEW is above
    the interval that OLD predicted, `improvement` if it is below, else `same within noise`.
    """
    rows = []
    for before in old:
        for after in new:
            if (before.name, before.dataset_hash, before.flops) == (after.name, after.dataset_hash, after.flops):
                was, now = _loss(before), _loss(after)
                bound = before.recipe.val_loss
                verdict = (
                    "regression" if now > bound.high else "improvement" if now < bound.low else "same within noise"
                )
                rows.append([verdict, before.name, _what(before), _what(after), was, now, 100 * (now / was - 1)])
    columns = ["verdict", "name", "old", "new", "old_loss", "new_loss", "change_percent"]
    return pd.DataFrame(rows, columns=columns)


def _what(r: Recommendation) -> str:
    return f"{r.recipe.backbone} of {r.recipe.parameters:,} parameters"


def _loss(r: Recommendation) -> float:
    return r.recipe.val_loss.value if r.outcome is None else r.outcome.val_loss
