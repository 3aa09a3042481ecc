"""How far is a prediction off because runs are noisy? `python -m benchmarks.studies.law_noise --out CSV`.

Searches of a known law are simulated with budgets a factor of 4 apart, three sizes at each, and diffscale's law of each
predicts the loss of the best size at 4.2 times the largest budget. The error is that of an ideal search: real runs
follow no law exactly, and their learning rates are not the best.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import numpy as np
import pandas as pd
import typer

from diffscale.core.app import command_app, run_app
from diffscale.report.stats.isoflop import fit_isoflop

app = command_app()
FACTOR, FURTHER = 4.0, 4.2


@app.command()
def main(
    searches: Annotated[int, typer.Option(help="simulated searches of each kind")] = 300,
    out: Annotated[Path | None, typer.Option(help="CSV file to write")] = None,
) -> None:
    """Write the error of predictions by number of budgets, of seeds at the smallest one, and noise of a run."""
    rows = []
    for budgets, seeds in ((3, 1), (3, 3), (4, 1), (4, 3), (5, 1)):
        for noise in (0.005, 0.01, 0.02, 0.04, 0.08):
            all_errors = 100 * np.abs([errors(seed, budgets, seeds, noise) for seed in range(searches)])
            loss, exponent, alone = all_errors.T
            rows.append(
                {
                    "budgets": budgets,
                    "seeds": seeds,
                    "noise_percent": 100 * noise,
                    "median_error_percent": round(float(np.median(loss)), 2),
                    "error_percent_of_9_in_10": round(float(np.quantile(loss, 0.9)), 2),
                    "share_within_3_percent": round(float((loss < 3).mean()), 3),
                    "exponent_error_percent": round(float(np.median(exponent)), 2),
                    "exponent_error_percent_of_runs_alone": round(float(np.median(alone)), 2),
                }
            )
            print("  ".join(f"{name} {value}" for name, value in rows[-1].items()), flush=True)
    if out is not None:
        pd.DataFrame(rows).to_csv(out, index=False)


def errors(seed: int, budgets: int, seeds: int, noise: float) -> tuple[float, float, float]:
    """Return by how much the predicted loss, the exponent of the best size, and that of the runs alone are off.

    As shares of the true ones. The law's exponents are drawn around published ones.

    seeds: training runs of each size at the smallest budget
    noise: standard deviation of log loss of a run
    """
    rng = np.random.default_rng(seed)
    exponent, alpha, curvature = rng.uniform(0.4, 0.6), rng.uniform(0.2, 0.4), rng.uniform(0.02, 0.06)
    floor = rng.uniform(0.0, 0.6)  # share of the loss at the smallest budget

    def best(compute: float) -> float:
        return floor + (1 - floor) * compute**-alpha

    runs = []
    for k in range(budgets):
        compute, middle = FACTOR**k, rng.normal(0, 0.3)
        for step in (-0.7, 0.0, 0.7):  # sizes a factor of two apart, around one that is not quite the best
            off = middle + step
            size = 1e5 * compute**exponent * np.exp(off)
            for _ in range(seeds if k == 0 else 1):
                loss = best(compute) * np.exp(curvature * off**2 + noise * rng.standard_normal())
                runs.append((size, compute, loss))
    sizes, computes, losses = np.array(runs).T
    law = fit_isoflop(sizes, computes, losses, sizes, resamples=1)
    assert law is not None
    further = FURTHER * FACTOR ** (budgets - 1)
    alone = law.exponents()["parameters"][0]
    return law.loss([further])[0, 0] / best(further) - 1, law.parameters[5] / exponent - 1, alone / exponent - 1


if __name__ == "__main__":
    run_app(app)
