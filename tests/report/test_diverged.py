"""A diverged run (value nan) is the worst of its group: never the best, never left out of a mean, never a crash."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner

from benchmarks.suites.against_peers import against_peers
from diffscale.records.schema import Record, rank
from diffscale.records.store import read_records, write_record
from diffscale.report.__main__ import app
from diffscale.report.analysis import analyse
from diffscale.report.stats.aggregate import aggregate
from diffscale.report.stats.compare import compare, regressed
from diffscale.report.stats.facets import to_rows
from diffscale.report.stats.frontier import is_on_frontier

from .records import LAWS, make_record, write_runs

DIVERGED = {"value": math.nan, "value_low": None, "value_high": None}


@pytest.mark.parametrize("metric", ["fid", "precision"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_it_ranks_behind_every_number(metric: str, value: float) -> None:
    assert rank(metric, value) > rank(metric, 1e9) > -math.inf
    assert rank(metric, value) > rank(metric, -1e9)


@pytest.mark.parametrize("higher", [False, True])
def test_it_is_not_on_a_frontier_and_hides_nothing_behind_it(higher: bool) -> None:
    values = [9.0, math.nan, 7.0, math.inf, 5.0]
    values = [-v for v in values] if higher else values
    assert is_on_frontier([1, 2, 3, 4, 5], values, higher).tolist() == [True, False, True, False, True]


def test_a_mean_over_seeds_is_nan_if_one_diverged() -> None:
    """pandas leaves nan out: two good seeds of three would have stood for the recipe."""
    records = [make_record(seed=0, value=10.0), make_record(seed=1, value=11.0), make_record(seed=2, **DIVERGED)]
    (point,) = aggregate(to_rows(records)).to_dict("records")
    assert math.isnan(point["value"])
    assert point["seeds"] == 3
    others = [make_record(seed=s, images_seen=8192, value=10.0 + s) for s in range(3)]
    table = aggregate(to_rows([*records, *others])).set_index("images_seen")
    assert table.loc[8192, "value"] == pytest.approx(np.exp(np.mean(np.log([10, 11, 12]))))
    assert math.isfinite(table.loc[8192, "value_low"])


@pytest.mark.parametrize("metric", ["fid", "precision"])
def test_a_run_that_began_to_diverge_is_a_regression_and_the_reverse_an_improvement(metric: str) -> None:
    good = [make_record(seed=s, metric=metric, value=0.8 + s / 100) for s in range(2)]
    bad = [make_record(seed=s, metric=metric, **DIVERGED) for s in range(2)]
    assert compare(good, bad)["verdict"].tolist() == ["regression"]
    assert regressed(compare(good, bad))
    assert compare(bad, good)["verdict"].tolist() == ["improvement"]
    assert compare(bad, bad)["verdict"].tolist() == ["same within noise"]


def records() -> list[Record]:
    """Four backbones of two seeds at four compute points; one diverges halfway, one from the beginning."""
    lost = {("rin", 3), *(("dit", step) for step in range(4))}
    kept = [
        make_record(model=model, seed=seed, images_seen=16384 * 2**step, **(DIVERGED if (model, step) in lost else {}))
        for model in LAWS
        for seed in range(2)
        for step in range(4)
    ]
    more = [make_record(model="unet", images_seen=16384 * 8, nfe=nfe, **DIVERGED) for nfe in (5, 10, 40)]
    swept = [
        make_record(
            model=model,
            schedule=schedule,
            resolution=side,
            eval_resolution=64,
            images_seen=65536,
            **(DIVERGED if schedule == "sigmoid" else {}),
        )
        for model in ("unet", "uvit")
        for schedule in ("simple_cosine", "sigmoid")
        for side in (16, 32)
    ]
    return [*kept, *more, *swept]


def test_every_table_and_sentence_of_a_report_is_made_without_it() -> None:
    analysis = analyse(records())
    assert not analysis.pareto["value"].isna().any()
    assert all(np.isfinite(curve.values).all() for curve in analysis.curves)
    assert "dit" not in {curve.model for curve in analysis.curves}
    best = [f["text"] for f in analysis.findings if f["kind"] == "best"]
    assert best
    assert not any("nan" in text or "dit" in text for text in best)
    assert analysis.sweep["schedule"].unique().tolist() == ["simple_cosine"]
    assert len(analysis.every) == len(records())


def test_the_whole_report_and_its_page_are_written(tmp_path: Path) -> None:
    place = write_runs(tmp_path / "runs", records(), grids=False)
    result = CliRunner().invoke(app, [place, "--out", str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    assert (tmp_path / "out" / "index.html").exists()
    points = pd.read_csv(tmp_path / "out" / "points.csv")
    assert points.loc[points["model"] == "dit", "value"].isna().all()


def test_a_report_of_diverged_runs_alone_is_written(tmp_path: Path) -> None:
    lost = [make_record(seed=s, images_seen=n, **DIVERGED) for s in range(2) for n in (4096, 8192, 16384)]
    place = write_runs(tmp_path / "runs", lost, grids=False)
    result = CliRunner().invoke(app, [place, "--out", str(tmp_path / "out")])
    assert result.exit_code == 0, result.output


def test_a_peer_is_compared_in_the_direction_of_the_metric() -> None:
    """The frontier of a metric of which more is better was taken as one of which less is."""

    def peer(width: int, value: float) -> Record:
        settings = {"peer.width": width, "peer.peer": "diffusers"}
        return make_record(model="diffusers", metric="precision", settings=settings, images_seen=10**6, value=value)

    ours = [
        make_record(metric="precision", images_seen=n, value=v)
        for n, v in ((10**5, 0.2), (2 * 10**5, 0.5), (4 * 10**5, 0.7))
    ]
    (row,) = against_peers([peer(32, 0.4), peer(64, 0.6), *ours]).to_dict("records")
    assert (row["peer_value"], row["width"], row["value_at_end"]) == (0.6, 64, 0.7)
    assert ours[1].train_flops < row["flops_to_reach"] < ours[2].train_flops


def test_a_record_of_nan_in_a_list_is_json(tmp_path: Path) -> None:
    record = make_record(val_loss=math.inf, val_loss_by_logsnr=[1.0, math.inf, math.nan, 2.0], **DIVERGED)
    text = json.loads(Path(write_record(str(tmp_path), record)).read_text())
    assert text["val_loss_by_logsnr"] == [1.0, "inf", "nan", 2.0]
    (row,) = read_records([str(tmp_path)])
    assert row.val_loss_by_logsnr is not None
    assert [math.isfinite(loss) for loss in row.val_loss_by_logsnr] == [True, False, False, True]
