"""Iso-FLOP laws on synthetic runs whose law is known."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy.optimize import least_squares

from diffscale.report.analysis import analyse
from diffscale.report.figures.plots import write_plots
from diffscale.report.stats.facets import to_rows
from diffscale.report.stats.isoflop import IsoFlop, fit_isoflop, isoflop
from diffscale.report.write import write_csvs

from .records import make_record

SMALLEST, FACTOR = 1e12, 4.0
NOISE = 0.004  # of log loss between seeds; 0.3 to 0.6 % at these sizes


class Truth:
    """A law with exponents drawn anew."""

    def __init__(self, rng: np.random.Generator, floor: float) -> None:
        self.a, self.alpha, self.curvature = rng.uniform(0.4, 0.6), rng.uniform(0.05, 0.15), rng.uniform(0.02, 0.06)
        self.floor = floor

    def size(self, compute: float) -> float:
        return 1e6 * (compute / (SMALLEST * FACTOR)) ** self.a

    def loss(self, compute: float, parameters: float | None = None) -> float:
        best = self.floor + 0.3 * (compute / (SMALLEST * FACTOR)) ** -self.alpha
        off = 0.0 if parameters is None else np.log(parameters / self.size(compute))
        return best * np.exp(self.curvature * off**2)


def runs(
    truth: Truth, rng: np.random.Generator, budgets: int, noise: float = NOISE
) -> list[tuple[float, float, float, float]]:
    """(parameters, compute, loss, FLOPs of an image): three sizes at each budget, two seeds at the smallest."""
    found = []
    for k in range(budgets):
        compute = SMALLEST * FACTOR**k
        for step in (-1.0, 0.0, 1.0):
            parameters = truth.size(compute) * np.exp(step + rng.normal(0, 0.3))
            for _ in range(2 if k == 0 else 1):
                loss = truth.loss(compute, parameters) * np.exp(noise * rng.standard_normal())
                found.append((parameters, compute, loss, 12 * parameters))
    return found


def fitted(seed: int, budgets: int, floor: float) -> tuple[Truth, IsoFlop]:
    rng = np.random.default_rng(seed)
    truth = Truth(rng, floor)
    law = fit_isoflop(*np.array(runs(truth, rng, budgets)).T)
    assert law is not None
    return truth, law


def test_intervals_cover_and_four_times_the_compute_is_predicted() -> None:
    """60 simulations; the aims are 95 %, 3 % of loss and 5 % of the exponent."""
    loss, size, error, exponent = [], [], [], []
    for seed in range(60):
        budgets, floor = (3, 4, 5)[seed % 3], (0.0, 0.05, 0.15)[seed // 3 % 3]
        truth, law = fitted(seed, budgets, floor)
        compute = SMALLEST * FACTOR**budgets
        value, low, high = law.loss([compute])[:, 0]
        loss.append(low <= truth.loss(compute) <= high)
        error.append(abs(value / truth.loss(compute) - 1))
        _, low, high = law.size([compute])[:, 0]
        size.append(low <= truth.size(compute) <= high)
        exponent.append(abs(law.exponents()["parameters"][0] / truth.a - 1))
    assert np.mean(loss) >= 0.9
    assert np.mean(size) >= 0.9
    assert np.quantile(error, 0.95) < 0.03
    assert np.median(exponent) < 0.05


def test_the_fit_is_that_of_scipy() -> None:
    """The law at the runs, fitted by scipy's trust region from the truth, is no nearer to them."""
    rng = np.random.default_rng(5)
    truth = Truth(rng, 0.05)
    parameters, compute, loss, per_image = np.array(runs(truth, rng, 4)).T
    law = fit_isoflop(parameters, compute, loss, per_image, exponent_spread=np.inf)
    assert law is not None

    def residuals(theta: np.ndarray) -> np.ndarray:
        scale, alpha, floor, curvature, size, a = theta
        x = np.log(compute / (4 * SMALLEST))
        best = floor + scale * np.exp(-alpha * x)
        return np.log(best) + curvature * (np.log(parameters) - size - a * x) ** 2 - np.log(loss)

    start = [0.3, truth.alpha, truth.floor, truth.curvature, np.log(1e6), truth.a]
    found = least_squares(residuals, start, bounds=([0, 0, 0, 0, 0, 0], [1, 2, 1, 1, 30, 2]))
    ours = np.array([law.at([n], c)[0] for n, c in zip(parameters, compute, strict=True)])
    assert (np.log(ours / loss) ** 2).sum() == pytest.approx(2 * found.cost, rel=1e-3)
    assert law.exponents()["parameters"][0] == pytest.approx(found.x[5], abs=1e-3)


def test_published_exponents_make_up_for_few_noisy_runs() -> None:
    """Nine sizes with the noise of runs of a hundred steps: the best size further out is known better, and covered."""
    with_them, alone, inside = [], [], []
    for seed in range(40):
        rng = np.random.default_rng(seed)
        truth = Truth(rng, 0.05)
        table = np.array(runs(truth, rng, 3, noise=0.04)).T
        compute = SMALLEST * FACTOR**4
        for errors, spread in ((with_them, 0.08), (alone, np.inf)):
            law = fit_isoflop(*table, exponent_spread=spread)
            assert law is not None
            best, low, high = law.size([compute])[:, 0]
            errors.append(abs(np.log(best / truth.size(compute))))
            inside += [low <= truth.size(compute) <= high] if errors is with_them else []
    assert np.median(with_them) < 0.75 * np.median(alone)
    assert np.mean(inside) >= 0.9


def test_images_are_what_the_best_size_leaves_of_the_compute() -> None:
    _, law = fitted(1, 4, 0.0)
    compute = np.array([1e13, 1e14])
    best, low, high = law.images(compute)
    np.testing.assert_allclose(best, compute / (12 * law.size(compute)[0]), rtol=1e-6)
    assert (low < best).all()
    assert (best < high).all()
    sizes, images = law.exponents()["parameters"][0], law.exponents()["images"][0]
    assert sizes + images == pytest.approx(1.0)


def test_too_few_runs_have_no_law() -> None:
    rng = np.random.default_rng(0)
    rows = np.array(runs(Truth(rng, 0.0), rng, 2))
    assert fit_isoflop(*rows.T) is None
    assert fit_isoflop(*np.array(runs(Truth(rng, 0.0), rng, 4))[::3].T) is None
    same = np.array(runs(Truth(rng, 0.0), rng, 4))
    same[:, 0] = 1e6 * np.exp(rng.normal(0, 1e-4, len(same)))  # variants of one network are no sizes
    assert fit_isoflop(*same.T) is None


def test_a_report_fits_each_backbone_and_predicts_its_largest_budget(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    records = []
    for model in ("unet", "dit"):
        truth = Truth(rng, 0.05)
        for parameters, compute, loss, per_image in runs(truth, rng, 4):
            images = round(compute / per_image)
            records.append(
                make_record(
                    model=model,
                    images_seen=images,
                    parameters=round(parameters),
                    flops_per_image=per_image,
                    train_flops=per_image * images,
                    val_loss=loss,
                    run_id=f"{model}-{len(records)}",
                    record_id=f"{model}-{len(records)}",
                )
            )
    table, laws = isoflop(to_rows(records))
    assert list(table["model"]) == ["dit", "unet"]
    assert len(laws) == 2
    assert (table["heldout_error_percent"].abs() < 3).all()
    assert table["budgets"].tolist() == [4, 4]
    analysis = analyse(records)
    write_csvs(analysis, tmp_path)
    assert len(pd.read_csv(tmp_path / "isoflop.csv")) == 2
    names = [path.name for path in write_plots(analysis, tmp_path)]
    assert "isoflop-unet.png" in names
    (text,) = [f["text"] for f in analysis.findings if f["kind"] == "isoflop" and f["text"].startswith("unet")]
    assert "the best size is" in text


@pytest.mark.slow
@pytest.mark.parametrize("budgets", [3, 4])
def test_nominal_95_percent_intervals_cover_at_four_times_the_largest_budget(budgets: int) -> None:
    """400 simulations, each share known to 0.01. With three and four budgets, of which the aim is 0.93 to 0.97:

    loss 0.938 and 0.938, of a new run 0.952 and 0.934, size 0.970 and 0.958. The exponent of the size is recovered
    within 2.2 and 1.5 % in the median; the aim is 5 %.
    """
    loss, run, size, exponent = [], [], [], []
    for seed in range(400):
        truth, law = fitted(2000 + seed, budgets, (0.0, 0.05, 0.15)[seed % 3])
        compute = SMALLEST * FACTOR**budgets
        _, low, high = law.loss([compute])[:, 0]
        loss.append(low <= truth.loss(compute) <= high)
        _, low, high = law.loss([compute], of="run")[:, 0]
        new = truth.loss(compute) * np.exp(NOISE * np.random.default_rng(seed).standard_normal(50))
        run.append(((low <= new) & (new <= high)).mean())
        _, low, high = law.size([compute])[:, 0]
        size.append(low <= truth.size(compute) <= high)
        exponent.append(abs(law.exponents()["parameters"][0] / truth.a - 1))
    for shares in (loss, run, size):
        assert 0.925 <= np.mean(shares) <= 0.98
    assert np.median(exponent) < 0.05
