"""A recorded step is the step: tested with a recorder that repeats the calls on the recorded inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from diffscale.config.factory import build_diffusion, build_model
from diffscale.data import Dataset
from diffscale.training.capture import WARM_UP, Capture
from diffscale.training.learner import Learner
from diffscale.training.numerics import Numerics
from diffscale.training.parallel import World

from .small import experiment
from .test_device_step import with_nan
from .test_learner import batches
from .test_resume import tensors


class NoReads(TorchDispatchMode):
    """What a CUDA graph cannot hold is an error: a value that the host reads, a shape that depends on values."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        assert name not in ("aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select"), name
        return func(*args, **(kwargs or {}))


class Repeater:
    """Records like CUDA: recording computes nothing, and a replay sees the recorded tensors alone."""

    def __init__(self) -> None:
        self.recorded, self.replayed = 0, 0

    @contextmanager
    def stream(self) -> Iterator[None]:
        yield

    def record(self, function: Callable[[], None]) -> Callable[[], None]:
        self.recorded += 1

        def replay() -> None:
            self.replayed += 1
            with NoReads():
                function()

        return replay


class Refuser(Repeater):
    def record(self, function: Callable[[], None]) -> Callable[[], None]:
        self.recorded += 1
        raise RuntimeError("operation not permitted when stream is capturing")


CASES: dict[str, dict[str, Any]] = {
    "unet": {"model": {"dropout": 0.1}},
    "accumulated": {"train": {"micro_batch": 5}, "optim": {"clip_grad_norm": 0.05}},
}


def make(storage: Path, dataset: Dataset, changes: dict[str, Any], recorder: Any) -> Learner:
    e = experiment(storage, **changes)
    torch.manual_seed(0)
    model = build_model(e, dataset)
    return Learner(
        model, build_diffusion(e, dataset), e, World(), Numerics(), dataset.num_classes, None, recorder=recorder
    )


@pytest.mark.parametrize("case", CASES)
def test_a_recorded_run_is_the_eager_run(shared_storage: Path, dataset: Dataset, case: str) -> None:
    recorder = Repeater()
    eager, recorded = (make(shared_storage, dataset, CASES[case], r) for r in (None, recorder))
    for i, batch in enumerate(batches(dataset, WARM_UP + 4)):
        batch = with_nan(batch) if i == WARM_UP + 1 else batch
        numbers = eager.draw_numbers(batch.positions)
        assert eager.step(batch) == recorded.step(batch, numbers=numbers) or i == WARM_UP + 1
    passes = 3 if case == "accumulated" else 1  # the first, those between, and the last are recorded separately
    assert recorder.recorded == passes + 1
    assert recorder.replayed == 4 * (passes + 1)
    want, got = tensors(eager), tensors(recorded)
    assert [name for name in want if not torch.equal(want[name], got[name])] == []


def test_a_step_that_cannot_be_recorded_is_launched_and_said_once(
    shared_storage: Path, dataset: Dataset, caplog: pytest.LogCaptureFixture
) -> None:
    recorder = Refuser()
    eager, refused = (make(shared_storage, dataset, {}, r) for r in (None, recorder))
    for batch in batches(dataset, WARM_UP + 3):
        assert eager.step(batch) == refused.step(batch)
    assert recorder.recorded == 1
    assert [record.message for record in caplog.records if "could not be recorded" in record.message] == [
        "a step is launched kernel by kernel, because it could not be recorded: "
        "operation not permitted when stream is capturing"
    ]


def test_other_shapes_and_options_are_recorded_separately() -> None:
    recorder, total = Repeater(), torch.zeros(())
    capture = Capture(recorder)

    def add(factor: float, x: torch.Tensor) -> None:
        total.add_(x.sum() * factor)

    for i in range(WARM_UP + 2):
        capture.call(add, 1.0, x=torch.full((2,), float(i)))
        capture.call(add, 2.0, x=torch.full((2,), float(i)))
        capture.call(add, 1.0, x=torch.full((3,), float(i)))
    assert total == sum(i * (2 + 4 + 3) for i in range(WARM_UP + 2))
    assert (recorder.recorded, recorder.replayed) == (3, 6)
