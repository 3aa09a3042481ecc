"""Figures that a paper could print: labels that do not collide, published marks only where they belong."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from diffscale.report import analyse
from diffscale.report.figures.plots import figures, write_plots
from diffscale.report.figures.published import matching
from diffscale.report.figures.style import BACKBONES, _spread, looks, style, tick
from diffscale.report.figures.sweep import shades

from .records import make_record


@given(st.lists(st.tuples(st.floats(0, 300), st.floats(5, 25)), min_size=1, max_size=12))
def test_labels_never_overlap_and_stay_above_the_axis(wanted: list[tuple[float, float]]) -> None:
    wanted = sorted(wanted)
    sizes = [size for _, size in wanted]
    places = _spread([place for place, _ in wanted], sizes, 10.0)
    edges = [(p - s / 2, p + s / 2) for p, s in zip(places, sizes, strict=True)]
    assert edges[0][0] >= 10 - 1e-6
    assert all(a[1] <= b[0] + 1e-6 for a, b in itertools.pairwise(edges))


def test_labels_that_do_not_collide_stay_where_they_are() -> None:
    assert _spread([50.0, 100.0], [10.0, 10.0], 0.0) == pytest.approx([50, 100])


def test_backbones_keep_their_colour_and_peers_get_others() -> None:
    assert looks(["unet", "diffusers-unet"])["unet"] == BACKBONES["unet"]
    assert len({look.color for look in looks([*BACKBONES, "peer-a", "peer-b"]).values()}) == len(BACKBONES) + 2


@pytest.mark.parametrize(
    ("value", "text"), [(50, "50"), (0.5, "0.5"), (20000, "20,000"), (1e14, "$10^{14}$"), (2e13, r"$2{\cdot}10^{13}$")]
)
def test_ticks_are_written_plainly(value: float, text: str) -> None:
    assert tick(value) == text


def test_published_systems_need_the_real_fid_the_dataset_and_the_resolution() -> None:
    assert {p.system for p in matching("fid", "CIFAR-10", 32)} == {"EDM", "EDM (conditional)", "DDPM"}
    assert {p.fid for p in matching("fid", "imagenet-64", 64)} >= {1.36, 2.07}
    assert matching("fd_efficientnet_lite0", "cifar10", 32) == []
    assert matching("fid", "cifar10", 64) == []
    assert matching("fid", "emoji", 32) == []


def texts(figure: object) -> str:
    import matplotlib.text

    return " ".join(t.get_text() for t in figure.findobj(matplotlib.text.Text))  # type: ignore[attr-defined]


def test_captions_name_metric_n_sampler_and_what_a_band_is() -> None:
    records = [
        make_record(model=m, seed=s, images_seen=4096 * 2**i)
        for m in ("unet", "rin")
        for s in range(2)
        for i in range(4)
    ]
    with style():
        drawn = dict(figures(analyse(records)))
    assert set(drawn) == {"fid_vs_compute", "fid_vs_wall_clock", "scaling"}
    for figure in drawn.values():
        text = texts(figure)
        for part in ("FID to cifar10 at 32×32", "n = 2,048 against 50,000", "dpmpp_2m 20 NFE", "95"):
            assert part in text.replace("\n", " ")
        assert "unet" in text
        assert "rin" in text
    assert "variance between seeds" in texts(drawn["fid_vs_compute"]).replace("\n", " ")
    assert "EDM 1.97" in texts(drawn["fid_vs_compute"])


def test_recipes_of_equal_compute_are_put_side_by_side_the_best_first() -> None:
    records = [make_record(value=10.0 + lr, settings={"optim.lr": lr}) for lr in (3, 1, 2)]
    with style():
        drawn = dict(figures(analyse(records)))
    assert set(drawn) == {"recipes-unet"}
    figure = drawn["recipes-unet"]
    assert [t.get_text() for t in figure.axes[0].get_yticklabels()] == [f"unet · lr {lr}" for lr in (1, 2, 3)]
    longer = make_record(images_seen=2 * records[0].images_seen, settings={"optim.lr": 3})
    with style():
        assert "recipes-unet" not in dict(figures(analyse([*records, longer])))


def test_names_that_matplotlib_would_read_as_mathematics_are_printed_as_they_are(tmp_path: Path) -> None:
    name = r"a$\frac{b$ <script> %s"
    kinds = itertools.product(range(3), ("a$_", "b"), (16, 32))
    records = [
        make_record(model=name, dataset=name, schedule=s, resolution=r, images_seen=4096 * 2**i, eval_resolution=64)
        for i, s, r in kinds
    ]
    paths = write_plots(analyse(records), tmp_path)
    assert len(paths) == 8
    svg = next(path for path in paths if path.name == "fid_vs_compute.svg").read_text()
    assert "<script" not in svg.replace("<!--", "").split("</metadata>")[1].lower().replace("&lt;script", "")
    assert all(path.stat().st_size > 5000 for path in paths)


def test_a_small_difference_has_little_colour_in_the_heat_map() -> None:
    """593 next to a best of 578, in one interval, was as dark as a factor of two."""
    grid = pd.DataFrame({8: [593.0, 578.0], 16: [578.0, 1156.0]}, index=["ddpm_linear", "simple_cosine"])
    expected = [[np.log(593 / 578) / np.log(2), 0.0], [0.0, 1.0]]
    np.testing.assert_allclose(shades(grid), expected)
    assert shades(grid[[8]])[0, 0] < 0.1
    np.testing.assert_allclose(shades(grid, higher=True)[:, 1], [1.0, 0.0])
