"""The step that decides on the device computes what the host decided before, to the bit, and never waits for it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from diffscale.config.factory import build_diffusion, build_model
from diffscale.data import Batch, Dataset
from diffscale.training.learner import Learner
from diffscale.training.numerics import Numerics
from diffscale.training.parallel import World
from tests.support.host_step import HostLearner

from .small import experiment
from .test_learner import batches
from .test_resume import MODELS

STEPS = 6
CASES: dict[str, dict[str, Any]] = {
    "plain": {"optim": {"clip_grad_norm": None}},
    "clipped": {"optim": {"clip_grad_norm": 0.05, "lr": 1e-3}},
    "sometimes-clipped": {"optim": {"clip_grad_norm": 1.0, "lr": 1e-3}},
    "accumulated": {"train": {"micro_batch": 5}},
    "warm-up": {"optim": {"schedule": "inverse_sqrt", "warmup_images": 40, "reference_images": 50}},
    "averages": {"train": {"ema": {"power": [0.05, 0.1], "halflife_images": 100, "halflife_fraction": None}}},
    "dropout": {"model": {"dropout": 0.1}, "train": {"micro_batch": 5}},
    "adam": {"optim": {"name": "adam", "weight_decay": 0.0}},
    "lamb": {"optim": {"name": "lamb", "clip_grad_norm": 0.05}},
}


def with_nan(batch: Batch) -> Batch:
    images = batch.images.clone()
    images[3, 0, 0, 0] = torch.nan
    return dataclasses.replace(batch, images=images)


def pair(
    storage: Path, dataset: Dataset, numerics: Numerics, changes: dict[str, Any], copies: bool
) -> tuple[Learner, HostLearner]:
    e = experiment(storage, **changes)
    diffusion = build_diffusion(e, dataset)

    def network() -> torch.nn.Module:
        torch.manual_seed(0)
        model = build_model(e, dataset)
        return model if copies else numerics.prepare(model)  # fused forwards of a CPU cast by themselves

    classes = dataset.num_classes
    return (
        Learner(network(), diffusion, e, World(), numerics, classes, None, copies=copies),
        HostLearner(network(), diffusion, e, numerics, classes),
    )


def check(storage: Path, dataset: Dataset, numerics: Numerics, changes: dict[str, Any], copies: bool = False) -> None:
    ours, theirs = pair(storage, dataset, numerics, changes, copies)
    for i, batch in enumerate(batches(dataset, STEPS)):
        batch = with_nan(batch) if i == 2 else batch
        step, (loss, norm, skipped) = ours.step(batch), theirs.step(batch)
        assert step.skipped == skipped == (i == 2)
        assert torch.equal(torch.tensor([step.loss, step.grad_norm]), torch.tensor([loss, norm])) or skipped
        names = [name for name, _ in ours.model.named_parameters()]
        for name, a, b in zip(names, ours.model.parameters(), theirs.model.parameters(), strict=True):
            assert torch.equal(a, b), f"weights of {name}, step {i}"
            state, reference = ours.optimizer.state[a], theirs.optimizer.state[b]
            for key, value in reference.items():
                assert torch.equal(torch.as_tensor(state[key]), torch.as_tensor(value)), f"{key} of {name}, step {i}"
        assert list(ours.ema.averages) == list(theirs.averages)
        for average, values in theirs.averages.items():
            for name, value in zip(names, values, strict=True):
                assert torch.equal(ours.ema.averages[average][name], value), f"{average} of {name}, step {i}"


@pytest.mark.parametrize("case", CASES)
def test_weights_moments_and_averages_are_those_of_the_hosts_decisions(
    shared_storage: Path, dataset: Dataset, case: str
) -> None:
    check(shared_storage, dataset, Numerics(), CASES[case])


@pytest.mark.parametrize("model", MODELS)
def test_every_network_trains_as_before(shared_storage: Path, dataset: Dataset, model: str) -> None:
    changes = {"model": MODELS[model], "optim": {"clip_grad_norm": 0.5}}
    check(shared_storage, dataset, Numerics(channels_last=model in ("unet", "uvit")), changes)


@pytest.mark.parametrize("model", MODELS)
def test_copies_of_the_weights_in_bf16_are_what_autocast_makes(
    shared_storage: Path, dataset: Dataset, model: str
) -> None:
    changes = {"model": MODELS[model], "train": {"micro_batch": 5, "precision": "bf16"}}
    check(shared_storage, dataset, Numerics("bf16"), changes, copies=True)


@pytest.mark.parametrize("model", MODELS)
def test_a_step_reads_nothing_from_the_device(shared_storage: Path, dataset: Dataset, model: str) -> None:
    """On the meta device a value that the host reads is an error."""
    e = experiment(shared_storage, model=MODELS[model], train={"micro_batch": 5})
    meta = torch.device("meta")
    with meta:
        network = build_model(e, dataset)
    of = Learner(network, build_diffusion(e, dataset), e, World(device=meta), Numerics(), dataset.num_classes, None)
    calls: list[Any] = []
    of.optimizer.step = lambda: calls.append(of.optimizer.found_inf)  # type: ignore[method-assign, attr-defined]
    batch = batches(dataset, 1)[0]
    of.launch(Batch(batch.images.to(meta), batch.labels.to(meta), batch.positions.to(meta)))
    assert [flag.device for flag in calls] == [meta]
    with pytest.raises(RuntimeError, match="meta"):
        of.launch(Batch(batch.images.to(meta), batch.labels.to(meta), batch.positions.to(meta))).read()


def test_what_a_graph_records_stays_where_it_is(shared_storage: Path, dataset: Dataset) -> None:
    """A replayed graph reads and writes the addresses of its recording, and no number of the host."""
    e = experiment(shared_storage, train={"micro_batch": 5, "ema": {"power": [0.05]}})
    of = Learner(build_model(e, dataset), build_diffusion(e, dataset), e, World(), Numerics(), dataset.num_classes)

    def addresses() -> list[int]:
        state = [t for tensors in of.optimizer.state.values() for t in tensors.values() if isinstance(t, torch.Tensor)]
        averages = [t for tensors in of.ema.averages.values() for t in tensors.values()]
        rates = [group["lr"] for group in of.optimizer.param_groups]
        return [t.data_ptr() for t in [*of.model.parameters(), *state, *averages, *rates]]

    seen = []
    for batch in batches(dataset, 4):
        of.step(batch)
        seen.append(addresses())
    assert seen[1] == seen[2] == seen[3]
    assert len(seen[1]) > 3 * len(list(of.model.parameters()))
