"""A pass that cannot fit is refused before the first step, and `train.micro_batch: auto` finds one that fits."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from diffscale.core.errors import UserError
from diffscale.core.text import gigabytes
from diffscale.data import Dataset
from diffscale.preflight.memory import estimate, largest_micro_batch
from diffscale.training.fit import CERTAIN, after_out_of_memory, fitted
from diffscale.training.parallel import World

from .small import BATCH, experiment


def test_the_largest_pass_is_the_last_that_the_estimate_lets_in(tmp_path: Path, dataset: Dataset):
    """The estimate is a constant and a part that grows with the images of a pass."""

    def needed(images: int) -> int:
        return estimate(experiment(tmp_path, train={"micro_batch": images}), dataset).total

    e = experiment(tmp_path)
    assert largest_micro_batch(e, dataset, needed(3)) == 3
    assert largest_micro_batch(e, dataset, needed(3) - 1) == 2
    assert largest_micro_batch(e, dataset, 1) == 0


def test_auto_makes_passes_of_one_size_and_leaves_the_run_its_identity(tmp_path: Path, dataset: Dataset):
    """A last pass of another size would be compiled and captured again."""
    auto = experiment(tmp_path, train={"micro_batch": "auto"})
    memory = estimate(experiment(tmp_path, train={"micro_batch": BATCH - 1}), dataset).total
    found = fitted(auto, dataset, World(), str(tmp_path), memory)
    assert found.train.micro_batch == -(-BATCH // 2)
    assert found.run_id("d") == auto.run_id("d") == experiment(tmp_path).run_id("d")
    assert fitted(auto, dataset, World(), str(tmp_path)).train.micro_batch is None  # on a CPU all at once
    with pytest.raises(ValueError, match="has not been replaced"):
        auto.train.pass_images  # noqa: B018 (the property raises)


def test_what_cannot_fit_is_told_with_the_estimate_and_the_most_that_would(
    tmp_path: Path, dataset: Dataset, caplog: pytest.LogCaptureFixture
):
    asked = experiment(tmp_path, train={"global_batch": 8192, "micro_batch": 8192, "compile": False})
    memory = int(estimate(asked, dataset, overhead=1.0).total / CERTAIN) - 1
    with pytest.raises(UserError, match=r"train\.micro_batch") as refused:
        fitted(asked, dataset, World(), str(tmp_path), memory)
    largest = largest_micro_batch(asked, dataset, memory)
    assert 1000 < largest < 8192
    assert f"at most about {largest} images" in refused.value.text()
    assert fitted(asked, dataset, World(), str(tmp_path), memory + 2) == asked
    assert "a worker may need" in caplog.text
    with pytest.raises(UserError, match="a network that fits this GPU"):
        fitted(experiment(tmp_path, train={"micro_batch": "auto"}), dataset, World(), str(tmp_path), 1000)


def test_after_running_out_of_memory_the_next_attempt_takes_half_as_many(tmp_path: Path, dataset: Dataset):
    auto = experiment(tmp_path, train={"micro_batch": "auto"})
    plenty = 1 << 40
    used = fitted(auto, dataset, World(), str(tmp_path), plenty)
    assert used.train.micro_batch == BATCH
    after_out_of_memory(auto, used, dataset, World(), str(tmp_path))
    assert fitted(auto, dataset, World(), str(tmp_path), plenty).train.micro_batch == BATCH // 2
    with pytest.raises(UserError, match=r"train\.micro_batch"):
        after_out_of_memory(used, used, dataset, World(), str(tmp_path))


def test_weights_are_divided_by_the_workers_that_hold_them_together(tmp_path: Path, dataset: Dataset):
    """Of 8 workers on two nodes, hsdp has all weights on each node; where the nodes are unknown one worker may."""
    world = World(size=8, node_size=4)

    def state(parallel: str, holders: int | None = None) -> int:
        e = experiment(tmp_path, train={"workers": 8, "global_batch": 16, "parallel": parallel})
        return estimate(e, dataset, holders=holders).state

    whole = state("ddp")
    for parallel, workers in (("ddp", 1), ("fsdp2", 8), ("hsdp", 4)):
        assert state(parallel, world.holders(parallel)) == whole // workers
    assert (state("fsdp2"), state("hsdp")) == (whole // 8, whole)
    e = experiment(tmp_path, train={"workers": 8, "global_batch": 16, "parallel": "hsdp", "micro_batch": "auto"})
    with pytest.raises(UserError, match="a network that fits this GPU") as refused:
        fitted(e, dataset, replace(world, size=1, node_size=4), str(tmp_path), 1000)
    assert f"about {gigabytes(estimate(e, dataset, holders=4).total)}" in refused.value.text()
