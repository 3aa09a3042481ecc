"""Evaluations of one checkpoint under several guidances: the best is chosen on held-out images alone."""

from __future__ import annotations

import json

import pytest

from diffscale.records.guidance import choice_text, choices, guidance_text
from diffscale.records.schema import Record
from diffscale.report.analysis import analyse
from diffscale.report.stats.facets import to_rows

from .records import make_record


def guided(scale: float, value: float, heldout: float | None, model: str = "unet", **more: object) -> Record:
    sampler = {"solver": {"name": "heun"}, "precision": "fp32", "guidance_scale": scale} | more
    return make_record(
        model=model,
        value=value,
        value_heldout=heldout,
        sampler=json.dumps(sampler, sort_keys=True),
        guidance_scale=scale,
        record_id=f"{model}-{scale}-{len(more)}",
    )


ROWS = [guided(1, 12.0, 30.0), guided(1.5, 10.0, 25.0), guided(3, 8.0, 27.0)]


def test_the_choice_sees_the_held_out_distance_alone() -> None:
    ((group, best),) = choices([row.model_dump() for row in ROWS])
    assert len(group) == 3
    assert best is not None
    assert best["guidance_scale"] == 1.5  # 3 has the lowest reported value
    text = choice_text(group, best)
    assert "Best guidance by fid to held-out images: 1.5 (of none 30, 1.5 25, 3 27)" in text
    assert "training images is 10;" in text


def test_nothing_is_chosen_without_held_out_images() -> None:
    ((group, best),) = choices([row.model_dump() for row in [*ROWS, guided(4, 1.0, None)]])
    assert best is None
    assert "No guidance is chosen" in choice_text(group, best)


def test_an_interval_and_a_guide_are_told_apart() -> None:
    row = guided(2, 9.0, 26.0, guidance_interval=[-3, 5], guide="abc", autoguidance=True)
    assert guidance_text(row.sampler).startswith("2 in [-3, 5]")
    ((group, _),) = choices([r.model_dump() for r in [*ROWS, row]])
    assert len(group) == 4


def test_backbones_are_compared_at_their_own_best_guidance_when_asked() -> None:
    other = [guided(1, 11.0, 22.0, "dit"), guided(1.5, 9.0, 24.0, "dit")]
    plain, best = to_rows([*ROWS, *other]), to_rows([*ROWS, *other], best_guidance=True)
    assert plain["facet"].nunique() == 3
    assert best["facet"].nunique() == 1
    assert dict(zip(best["model"], best["value"], strict=True)) == {"unet": 10.0, "dit": 11.0}
    analysis = analyse([*ROWS, *other], best_guidance=True)
    assert "each at its own best guidance" in analysis.facets["title"].iloc[0]
    kinds = [finding["kind"] for finding in analyse([*ROWS, *other]).findings]
    assert kinds.count("guidance") == 2


@pytest.mark.parametrize(
    ("text", "overrides"),
    [
        ("", []),
        ("1.5", ["eval.guidance_scale=1.5"]),
        ("2,interval=-3:5", ["eval.guidance_scale=2", "eval.guidance_interval=[-3,5]"]),
        ("2,guide=/runs/weak", ["eval.guidance_scale=2", "eval.guide=/runs/weak"]),
    ],
)
def test_a_guidance_on_the_command_line_is_short_for_settings(text: str, overrides: list[str]) -> None:
    from diffscale.training.evaluate_runs import guidance_settings

    assert guidance_settings(text) == overrides
