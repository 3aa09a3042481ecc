"""Passes of one size: where another size would be compiled or recorded again, the last pass is filled up."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch._dynamo.utils import counters

from diffscale.config.factory import build_diffusion, build_model
from diffscale.data import Dataset
from diffscale.training.learner import Learner, filled_up
from diffscale.training.numerics import Numerics, compile_blocks
from diffscale.training.parallel import World

from .small import BATCH, experiment
from .test_learner import batches

MICRO = 5  # of a batch of 12: passes of 5, 5 and 2


def learner(storage: Path, dataset: Dataset, compiled: bool, micro_batch: int | None) -> tuple[Learner, list[int]]:
    """A learner that takes its network for a compiled one or not, and the sizes of the passes that it makes."""
    e = experiment(storage, train={"micro_batch": micro_batch})
    torch.manual_seed(0)
    model, sizes = build_model(e, dataset), []
    model.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    numerics = Numerics(compile=compiled)
    return Learner(model, build_diffusion(e, dataset), e, World(), numerics, dataset.num_classes), sizes


def test_a_filled_pass_changes_nothing_but_rounding(shared_storage: Path, dataset: Dataset):
    filled, sizes = learner(shared_storage, dataset, True, MICRO)
    shorter, plain_sizes = learner(shared_storage, dataset, False, MICRO)
    for batch in batches(dataset, 3):
        a, b = filled.step(batch), shorter.step(batch)
        assert a.loss == pytest.approx(b.loss, rel=1e-6)
        assert a.quartile_counts == b.quartile_counts
        assert sum(a.quartile_counts) == BATCH
        assert a.quartile_sums == pytest.approx(b.quartile_sums, rel=1e-6)
        assert a.grad_norm == pytest.approx(b.grad_norm, rel=1e-5)
    assert set(sizes) == {MICRO}
    assert set(plain_sizes) == {MICRO, BATCH % MICRO}
    for p, q in zip(filled.model.parameters(), shorter.model.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6)


def test_nothing_is_compiled_after_the_first_step(shared_storage: Path, dataset: Dataset):
    torch._dynamo.reset()
    counters.clear()
    compiled, _ = learner(shared_storage, dataset, True, MICRO)
    compile_blocks(compiled.model, "eager")
    graphs = []
    for batch in batches(dataset, 3):
        compiled.step(batch)
        graphs.append(counters["stats"]["unique_graphs"])
    assert 0 < graphs[0] == graphs[-1]


def test_what_is_added_counts_nothing(shared_storage: Path, dataset: Dataset):
    part = {"positions": torch.tensor([7, 8]), "images": torch.randn(2, 3, 4, 4)}
    full = filled_up(part, 5, 1.0)
    assert full["weights"].tolist() == [1, 1, 0, 0, 0]
    assert full["positions"].tolist() == [7, 8, 8, 8, 8]
    assert torch.equal(full["images"][:2], part["images"])
    assert filled_up(part, 3, 0.0)["weights"].tolist() == [0, 0, 0]  # a pass made only because other ranks make one
