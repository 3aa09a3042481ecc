"""A step launches few kernels and reads nothing: counted on a fake H200, in a process of its own."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.common import fake_gpu
from benchmarks.throughput.count_launches import counted

pytestmark = pytest.mark.skipif(bool(fake_gpu.unavailable()), reason=fake_gpu.unavailable() or "available")

MOST = {"unet-tiny": 1100, "dit-tiny": 500}  # launches of an eager step of 256 images in bf16; before, 1,880 and 875


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
