"""Nothing is compared across groups or kinds of endpoint; runs that differ by their seed alone are one recipe."""

from __future__ import annotations

import pytest

from diffscale.records.schema import GROUP
from diffscale.report.stats.facets import facet_table, recipe_settings, schedule_labels, to_rows

from .records import make_record

OTHER = {
    "network": "dinov2",
    "reference": "feedfacefeedface",
    "eval_resolution": 64,
    "resize": "box",
    "n_generated": 5000,
    "n_reference": 10_000,
    "sampler": '{"name":"heun"}',
    "metric": "fd_dinov2",
    "endpoint": "decayed",
}


@pytest.mark.parametrize("column", [*GROUP, "endpoint"])
def test_records_that_differ_in_any_group_column_or_endpoint_are_in_different_facets(column: str) -> None:
    base = make_record()
    changed = base.model_copy(update={column: OTHER[column], "record_id": "0" * 16})
    assert to_rows([base, changed])["facet"].nunique() == 2


def test_bf16_and_float32_samples_of_one_solver_are_in_one_facet() -> None:
    sampler = '{"precision":"%s","solver":{"name":"heun","steps":18}}'
    rows = to_rows([make_record(sampler=sampler % precision) for precision in ("bf16", "fp32")])
    assert rows["facet"].nunique() == 1
    assert list(rows["sampler"]) == [sampler % "bf16", sampler % "fp32"]


@pytest.mark.parametrize(
    "setting",
    [
        ("train.seed", 7),
        ("train.workers", 4),
        ("train.micro_batch", 8),
        ("storage", "/elsewhere"),
        ("name", "again"),
        ("data.path", "s3://b/x"),
        ("train.images", 1),
        ("eval.n_generated", 5),
        ("train.checkpoint.keep_last", 9),
    ],
)
def test_seed_place_and_length_do_not_change_the_recipe(setting: tuple[str, object]) -> None:
    base = make_record()
    changed = make_record(seed=3, images_seen=131072, settings={setting[0]: setting[1]})
    rows = to_rows([base, changed])
    assert rows["recipe"].nunique() == 1
    assert rows["run_id"].nunique() == 2


@pytest.mark.parametrize("setting", [("optim.lr", 1e-3), ("train.global_batch", 512), ("model.width", 64)])
def test_what_changes_the_weights_changes_the_recipe(setting: tuple[str, object]) -> None:
    rows = to_rows([make_record(), make_record(settings={setting[0]: setting[1]})])
    assert rows["recipe"].nunique() == 2
    assert rows["recipe_label"].nunique() == 2
    assert setting[0].rpartition(".")[2] in " ".join(rows["recipe_label"])


def test_a_label_leaves_out_what_most_recipes_have_in_common() -> None:
    usual = {"model.skips": True, "model.dropout": 0}
    given = [usual, usual | {"model.skips": False}, usual | {"model.dropout": 0.1}]
    rows = to_rows([make_record(settings=settings) for settings in given])
    assert list(rows["recipe_label"]) == ["unet", "unet · skips False", "unet · dropout 0.1"]


def test_decay_branches_of_different_length_are_one_recipe_and_others_are_not() -> None:
    settings = {"optim.decay_images": 1000, "optim.lr": 1e-4}
    assert recipe_settings(settings, "decayed") == {"optim.lr": 1e-4}
    assert recipe_settings(settings, "constant") == settings


def test_schedule_labels_name_the_parameters_that_differ_and_the_input_scale() -> None:
    fixed = {"diffusion.schedule.logsnr_max": 15.0}
    rows = to_rows(
        [
            make_record(settings=fixed | {"diffusion.schedule.noise_resolution": 32}, input_scale=0.4),
            make_record(settings=fixed | {"diffusion.schedule.noise_resolution": None}),
            make_record(schedule="sigmoid", settings={"diffusion.schedule.tau": 0.9}),
        ]
    )
    assert sorted(schedule_labels(rows)) == [
        "sigmoid",
        "simple_cosine(noise_resolution 32) · b 0.4",
        "simple_cosine(noise_resolution none)",
    ]


def test_main_facet_is_real_fid_with_most_runs_and_mid_decay_comes_last() -> None:
    kinds = [("fd_lite", "constant"), ("fid", "mid_decay"), ("fid", "constant"), ("kid", "constant")]
    records = [make_record(seed=seed, metric=metric, endpoint=end) for seed in range(2) for metric, end in kinds]
    table = facet_table(to_rows(records))
    assert [(r.metric, r.endpoint) for r in table.itertuples()] == [
        ("fid", "constant"),
        ("fd_lite", "constant"),
        ("kid", "constant"),
        ("fid", "mid_decay"),
    ]


def test_facets_with_similar_texts_are_distinguished() -> None:
    base = make_record()
    twin = base.model_copy(update={"reference": "feedfacefeedface", "record_id": "0" * 16})
    assert facet_table(to_rows([base, twin]))["title"].nunique() == 2


def test_the_comparison_of_backbones_comes_before_a_larger_sweep_of_one() -> None:
    backbones = [make_record(model=model) for model in ("unet", "uvit")]
    swept = [make_record(settings={"optim.lr": lr}, eval_resolution=64) for lr in (1e-4, 2e-4, 4e-4)]
    assert facet_table(to_rows([*swept, *backbones]))["runs"].tolist() == [2, 3]
