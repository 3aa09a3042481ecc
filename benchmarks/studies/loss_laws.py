"""Which law would have predicted the recipes' losses? `python -m benchmarks.studies.loss_laws FOLDER ... --out CSV`.

Each law is fitted to the runs of a recommendation's search and predicts the loss of its recipe, which is known by now:

isoflop           that of diffscale, `report/stats/isoflop.py`: a floor for each backbone, less weight for bad sizes,
                  published exponents of the best size as one more measurement
free_exponent     the same without these
equal_weights     the same with equal weights
shared_floor      the same with one floor for all backbones: the irreducible loss is one of the data
sizes_and_images  L = E + A N^-a + B D^-b, Hoffmann et al. (arXiv 2203.15556), approach 3; N in FLOPs of an image
last_two_budgets  a power law through the best losses of the two largest budgets
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pandas as pd
import typer
from numpy.typing import NDArray
from scipy.optimize import least_squares

from diffscale.core.app import command_app, run_app
from diffscale.records.recommendation import Recommendation, read_recommendations
from diffscale.report.stats.isoflop import HIGH, LOW, fit_isoflop, log_loss, root_weights
from diffscale.report.stats.predictions import loss_law, points_of

app = command_app()


@app.command()
def main(
    folders: Annotated[list[Path], typer.Argument(help="folders of recommendations whose recipes were trained")],
    out: Annotated[Path | None, typer.Option(help="CSV file to write")] = None,
) -> None:
    """Write the error of every law in percent, the noise of the runs around that of diffscale, and its interval."""
    rows = []
    for folder in folders:
        for found in read_recommendations([str(folder.resolve())]):
            if found.outcome is not None:
                rows.append({"recommendation": folder.name} | errors(found))
                print("  ".join(f"{name} {value}" for name, value in rows[-1].items()), flush=True)
    if out is not None:
        pd.DataFrame(rows).to_csv(out, index=False)


def errors(found: Recommendation) -> dict[str, Any]:
    """Return what the recipe is, what came out, and by law how far its prediction is from that, in percent."""
    recipe, outcome = found.recipe, found.outcome
    assert outcome is not None
    tables = {part.backbone: points_of(part) for part in found.searched}
    table, flops = tables[recipe.backbone], recipe.flops
    law = loss_law(next(part for part in found.searched if part.backbone == recipe.backbone))
    assert law is not None
    sizes, compute, loss, cost = (table[name] for name in ("parameters", "flops", "val_loss", "flops_per_image"))
    runs = (sizes, compute, loss, cost)
    free = fit_isoflop(*runs, exponent_spread=np.inf, resamples=1)
    equal = fit_isoflop(*runs, near=np.inf, resamples=1)
    assert free is not None
    assert equal is not None
    low, high = (float(v[0]) for v in law.loss([flops], of="run")[1:])
    predicted = {
        "isoflop": float(law.loss([flops])[0, 0]),
        "free_exponent": float(free.loss([flops])[0, 0]),
        "equal_weights": float(equal.loss([flops])[0, 0]),
        "shared_floor": shared_floor(tables, flops)[recipe.backbone],
        "sizes_and_images": sizes_and_images(table, flops),
        "last_two_budgets": last_two_budgets(table, flops),
    }
    return {
        "backbone": recipe.backbone,
        "times_largest_budget": round(flops / found.budgets[-1], 2),
        "val_loss": round(outcome.val_loss, 5),
        "noise_percent": round(100 * law.rms, 1),
        "low": round(low, 5),
        "high": round(high, 5),
        "inside": low <= outcome.val_loss <= high,
    } | {name: round(100 * (value / outcome.val_loss - 1), 1) for name, value in predicted.items()}


def shared_floor(tables: dict[str, pd.DataFrame], flops: float) -> dict[str, float]:
    """Return the predicted loss by backbone. tables: the runs of each."""
    reference = float(np.exp(np.log(pd.concat(tables.values())["flops"]).mean()))
    own = np.r_[0:2, 3:6]  # places of a backbone's parameters in NAMES, all but the floor
    runs = []
    for table in tables.values():
        compute, sizes, loss = (np.log(table[name].to_numpy(float)) for name in ("flops", "parameters", "val_loss"))
        runs.append((compute - np.log(reference), sizes, loss, root_weights(loss, table["budget"].to_numpy())))

    def laws(theta: NDArray) -> list[NDArray]:
        return [np.insert(backbone, 2, theta[0])[None] for backbone in theta[1:].reshape(-1, 5)]

    def residuals(theta: NDArray) -> NDArray:
        parts = zip(laws(theta), runs, strict=True)
        return np.concatenate([weight * (log_loss(law, x, s)[0][0] - y) for law, (x, s, y, weight) in parts])

    lowest = min(float(table["val_loss"].min()) for table in tables.values())
    low, high = (np.r_[floor, np.tile(bound[own], len(tables))] for floor, bound in ((-12.0, LOW), (0.0, HIGH)))
    starts = []
    for share in (0.1, 0.5, 0.9):
        start = [np.log(share * lowest)]
        for table in tables.values():
            start += [np.log(table["val_loss"].median()), np.log(0.3), np.log(0.05)]
            start += [np.log(table["parameters"].median()), 0.5]
        starts.append(least_squares(residuals, np.clip(start, low + 1e-6, high - 1e-6), bounds=(low, high)))
    best = laws(min(starts, key=lambda fit: fit.cost).x)
    x = np.array([np.log(flops / reference)])
    return {
        name: float(np.exp(log_loss(law, x, law[0, 4] + law[0, 5] * x)[0][0, 0]))
        for name, law in zip(tables, best, strict=True)
    }


def sizes_and_images(table: pd.DataFrame, flops: float) -> float:
    """Return the predicted loss of the best size."""
    cost, images, loss = (table[name].to_numpy(float) for name in ("flops_per_image", "images", "val_loss"))
    weight = root_weights(np.log(loss), table["budget"].to_numpy())
    middle = np.exp(np.log(cost).mean()), np.exp(np.log(images).mean())

    def log_sum(theta: NDArray, cost: NDArray, images: NDArray) -> NDArray:
        floor, of_cost, of_images = np.exp(theta[:3])
        return np.log(floor + of_cost * (cost / middle[0]) ** -theta[3] + of_images * (images / middle[1]) ** -theta[4])

    def residuals(theta: NDArray) -> NDArray:
        return weight * (log_sum(theta, cost, images) - np.log(loss))

    bounds = ([-12, -12, -12, 0.05, 0.05], [0, 5, 5, 2, 2])
    levels = [np.log(loss.min() * share) for share in (0.2, 0.6, 0.9)]
    fits = [
        least_squares(residuals, [level, *2 * [np.log(loss.min() * 0.3)], 0.4, 0.4], bounds=bounds) for level in levels
    ]
    sizes = np.geomspace(cost.min() / 3, cost.max() * 30, 2000)
    return float(np.exp(log_sum(min(fits, key=lambda fit: fit.cost).x, sizes, flops / sizes).min()))


def last_two_budgets(table: pd.DataFrame, flops: float) -> float:
    """Return the predicted loss."""
    means = table.groupby(["budget", "rung"])[["flops", "val_loss"]].mean()
    best = means.loc[means.groupby("budget")["val_loss"].idxmin()]
    (smaller, higher), (larger, lower) = best.to_numpy(float)[-2:]
    return float(lower * (flops / larger) ** (np.log(lower / higher) / np.log(larger / smaller)))


if __name__ == "__main__":
    run_app(app)
