"""A step launches few kernels, in bf16, and reads nothing: counted on a fake H200, in a process of its own."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.common import fake_gpu
from benchmarks.throughput.count_launches import counted
from diffscale.models import PRESETS

pytestmark = pytest.mark.skipif(bool(fake_gpu.unavailable()), reason=fake_gpu.unavailable() or "available")

MOST = {"unet-tiny": 1100, "dit-tiny": 450}  # launches of an eager step of 256 images in bf16; before, 1,880 and 875
OTHERS = [name for name in PRESETS if name not in MOST and not PRESETS[name].get("image_channels")]  # upsamplers


@pytest.fixture(scope="module")
def rows() -> dict[str, dict[str, Any]]:
    return {row["preset"]: row for row in counted(list(MOST))}


@pytest.mark.parametrize("preset", list(MOST))
def test_a_step_launches_few_kernels(rows: dict[str, dict[str, Any]], preset: str) -> None:
    assert rows[preset]["launches"] <= MOST[preset], rows[preset]["commonest"]


@pytest.mark.parametrize("preset", list(MOST))
def test_a_step_waits_for_nothing_but_its_result(rows: dict[str, dict[str, Any]], preset: str) -> None:
    """The result is read from pinned memory; a value read from the device, or a copy that waits, would be listed."""
    assert rows[preset]["reads"] == {}


@pytest.mark.parametrize("preset", list(MOST))
def test_a_captured_step_is_two_launches_and_the_copies_of_its_inputs(rows: dict[str, dict[str, Any]], preset: str):
    assert rows[preset]["graphs"] == 2
    assert set(rows[preset]["beside_graphs"]) <= {"copy_", "_to_copy"}
    assert sum(rows[preset]["beside_graphs"].values()) <= 8


@pytest.mark.parametrize("preset", list(MOST))
def test_products_are_in_low_precision_and_attention_is_one_kernel(rows: dict[str, dict[str, Any]], preset: str):
    check(rows[preset])


@pytest.mark.slow
@pytest.mark.parametrize("preset", OTHERS)
def test_so_are_those_of_every_preset(preset: str) -> None:
    row = counted([preset], batch=2)[0]
    check(row)
    assert row["reads"] == {}


def check(row: dict[str, Any]) -> None:
    assert row["float32_share"] < 0.02
    assert row["attention"]
    assert "unfused" not in row["attention"]
