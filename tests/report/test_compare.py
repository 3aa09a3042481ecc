"""`--compare OLD NEW`: regressions beyond noise, and nothing else, make continuous integration fail."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from diffscale.core.errors import UserError
from diffscale.report.__main__ import app
from diffscale.report.stats.compare import compare, regressed

from .records import make_record, write_runs

OLD = (20.0, 20.4, 19.7)


def runs(values: tuple[float, ...], **more: object) -> list:
    return [make_record(seed=s, value=v, **more) for s, v in enumerate(values)]


def verdict(new: list, old: list | None = None) -> str:
    return str(compare(old or runs(OLD), new)["verdict"].iloc[0])


def test_worse_beyond_noise_is_a_regression_and_better_an_improvement() -> None:
    assert verdict(runs((25.0, 25.2, 24.9))) == "regression"
    assert verdict(runs((15.0, 15.2, 14.9))) == "improvement"
    assert regressed(compare(runs(OLD), runs((25.0, 25.2, 24.9))))


def test_worse_within_noise_is_none() -> None:
    table = compare(runs(OLD), runs((20.3, 20.9, 20.0)))
    assert table["verdict"].tolist() == ["same within noise"]
    assert not regressed(table)


def test_lower_precision_is_a_regression() -> None:
    old, new = runs((0.8, 0.81), metric="precision"), runs((0.5, 0.51), metric="precision")
    assert verdict(new, old) == "regression"
    assert verdict(old, new) == "improvement"


def test_more_flops_per_image_is_a_regression_without_any_noise() -> None:
    new = [r.model_copy(update={"flops_per_image": r.flops_per_image * 1.02}) for r in runs(OLD)]
    assert verdict(new) == "costs more"
    assert regressed(compare(runs(OLD), new))


def test_a_new_setting_does_not_hide_the_comparison_but_a_changed_one_is_another_recipe() -> None:
    assert verdict(runs((25.0, 25.2, 24.9), settings={"optim.new_default": True})) == "regression"
    with pytest.raises(UserError, match="--compare"):
        compare(runs(OLD), runs(OLD, settings={"optim.lr": 1e-3}))


def test_other_groups_are_not_compared() -> None:
    with pytest.raises(UserError, match="no such pair"):
        compare(runs(OLD), runs(OLD, n_generated=5000))


def test_single_evaluations_use_the_evaluations_interval_and_without_one_nothing_is_compared() -> None:
    table = compare(runs((20.0,)), runs((30.0,)))
    assert (table["verdict"].iloc[0], table["noise"].iloc[0]) == ("regression", "evaluation")
    bare = {"value_low": None, "value_high": None}
    assert verdict(runs((30.0,), **bare), runs((20.0,), **bare)) == "noise unknown"
    assert verdict(runs((20.0,), **bare), runs((20.0,), **bare)) == "same within noise"


@pytest.mark.parametrize(("new", "code"), [((25.0, 25.2, 24.9), 1), (OLD, 0)])
def test_exit_code_and_csv(tmp_path: Path, new: tuple[float, ...], code: int) -> None:
    old_place = write_runs(tmp_path / "old", runs(OLD), grids=False)
    new_place = write_runs(tmp_path / "new", runs(new), grids=False)
    out = tmp_path / "out"
    result = CliRunner().invoke(app, ["--compare", old_place, new_place, "--out", str(out)])
    assert result.exit_code == code, result.output
    assert ("regression" in result.output) == bool(code)
    assert (out / "compare.csv").read_text().startswith("verdict,")
