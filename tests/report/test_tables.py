"""Schedule × resolution at equal compute, what a value cost, and every evaluation with everything that made it."""

from __future__ import annotations

import json
import math

import numpy as np
import pandas as pd
import pytest

from diffscale.records.schema import Record
from diffscale.report.stats.aggregate import aggregate
from diffscale.report.stats.facets import to_rows
from diffscale.report.stats.tables import cost, every_evaluation, ladder, sweep
from diffscale.report.write import analyse, write_csvs

from .records import make_record


def cell(schedule: str, side: int, images: list[int], **more: object) -> list[Record]:
    return [make_record(schedule=schedule, resolution=side, images_seen=n, eval_resolution=64, **more) for n in images]


def test_sweep_compares_cells_at_the_largest_compute_all_reached() -> None:
    """A 64-pixel image costs four of 32 pixels here, so 4096 of the one meet 16384 of the other."""
    records = [r for name in ("cosine", "sigmoid") for r in cell(name, 64, [1024, 2048, 4096])]
    records += [r for name in ("cosine", "sigmoid") for r in cell(name, 32, [4096, 16384, 65536])]
    table = sweep(aggregate(to_rows(records)))
    assert len(table) == 4
    assert table["train_flops"].nunique() == 1
    assert table["train_flops"].iloc[0] == pytest.approx(2.4e8 * 16384)
    by_points = aggregate(to_rows(records)).query("images_seen == 16384 and train_resolution == 32")
    assert set(table.query("train_resolution == 32")["value"].round(9)) == set(by_points["value"].round(9))
    assert (table.query("train_resolution == 32")["final_images_seen"] == 65536).all()


def test_a_cell_that_starts_above_the_common_compute_has_no_value_there() -> None:
    records = cell("cosine", 32, [1024, 2048]) + cell("sigmoid", 32, [65536, 131072])
    table = sweep(aggregate(to_rows(records))).set_index("schedule")
    assert math.isnan(table.loc["sigmoid", "value"])
    assert table.loc["sigmoid", "final_value"] > 0


def test_cells_of_one_table_differ_in_schedule_and_resolution_alone() -> None:
    """The quickstart's UNet of 24 channels and its sweep's of 16 stood in one table: 638 next to 849."""
    narrow, wide = ({"model.model_channels": width} for width in (16, 24))
    records = [r for name in ("cosine", "sigmoid") for r in cell(name, 32, [1024, 2048], settings=narrow)]
    records += cell("cosine", 32, [4096, 8192], settings=wide)
    table = sweep(aggregate(to_rows(records)))
    assert table["family"].nunique() == 1
    assert (table["final_images_seen"] == 2048).all()  # the wide network is alone in its family: no table
    records += cell("sigmoid", 32, [4096, 8192], settings=wide)
    table = sweep(aggregate(to_rows(records)))
    assert sorted(table.groupby("family")["final_images_seen"].unique().map(list)) == [[2048], [8192]]
    assert set(table["family_label"]) == {"model_channels 16", "model_channels 24"}


def test_resolutions_without_a_common_eval_resolution_are_never_in_one_table() -> None:
    records = [make_record(schedule=s, resolution=r, eval_resolution=r) for s in ("a", "b") for r in (16, 32)]
    table = sweep(aggregate(to_rows(records)))
    assert table.groupby("facet")["train_resolution"].nunique().max() == 1


def test_the_spread_of_a_metric_is_tabulated_and_never_compared(tmp_path) -> None:
    records = [make_record(model=m, metric=k) for m in ("unet", "rin") for k in ("kid", "kid_std")]
    analysis = analyse(records)
    write_csvs(analysis, tmp_path)
    metrics = {path.stem: set(pd.read_csv(path)["metric"]) for path in tmp_path.glob("*.csv")}
    assert metrics["fid_vs_compute"] == metrics["facets"] == {"kid", "kid_std"}
    assert all(found <= {"kid"} for name, found in metrics.items() if name not in ("fid_vs_compute", "facets"))
    assert set(analysis.points["metric"]) == {"kid"}


def test_one_schedule_at_one_resolution_is_no_sweep() -> None:
    assert sweep(aggregate(to_rows([make_record(seed=s) for s in range(3)]))).empty


def test_cost_says_what_each_backbone_spent_and_what_never_got_there() -> None:
    records = [
        make_record(model=m, images_seen=n, value=v, energy_joules=n * 2.0)
        for m, values in (("unet", (80, 40, 20)), ("rin", (90, 80, 70)))
        for n, v in zip((1000, 2000, 4000), values, strict=True)
    ]
    table = cost(aggregate(to_rows(records)))
    best = table.sort_values("target").groupby("model").head(1).set_index("model")
    assert best.loc["unet", "target"] == pytest.approx(20)
    assert best.loc["unet", "train_flops"] == pytest.approx(4000 * 2.4e8)
    assert best.loc["unet", "energy_kwh"] == pytest.approx(8000 / 3.6e6)
    assert best.loc["unet", "cost"] == pytest.approx(best.loc["unet", "device_hours"] * 0.05)
    assert math.isnan(best.loc["rin", "train_flops"])


@pytest.mark.parametrize(("values", "higher"), [((12.34, 480.2), False), ((0.11, 0.87), True), ((-0.01, 0.4), False)])
def test_ladder_is_round_and_its_best_step_was_reached(values: tuple[float, float], higher: bool) -> None:
    steps = ladder(np.array(values), 6, higher)
    assert all(float(f"{step:.2g}") == step for step in steps)
    assert all(values[0] <= step <= values[1] for step in steps)
    assert len(steps) >= 5


def test_every_evaluation_has_all_columns_of_the_record_in_order_and_settings_as_json() -> None:
    records = [make_record(seed=s, metric=m) for s in range(2) for m in ("fid", "kid")]
    table = every_evaluation(to_rows(records))
    assert list(table.columns) == [*Record.model_fields, "facet", "recipe"]
    assert len(table) == 4
    assert json.loads(table["settings"].iloc[0])["optim.lr"] == 2e-4


def test_tuning_budget_of_each_backbone_is_reported() -> None:
    tried = [("unet", 1e-4), ("unet", 2e-4), ("unet", 4e-4), ("rin", 1e-4)]
    records = [make_record(model=m, settings={"optim.lr": lr}, seed=seed) for m, lr in tried for seed in range(2)]
    (text,) = [f["text"] for f in analyse(records).findings if f["kind"] == "tuning"]
    assert "rin 1 (" in text
    assert "unet 3 (9.4e13 FLOPs)" in text  # 3 rates x 2 seeds x 65536 images x 2.4e8 FLOPs
