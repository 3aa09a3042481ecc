from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from diffscale.config.factory import build_diffusion, build_model
from diffscale.core.errors import UserError
from diffscale.data import Batch, Dataset, Loader
from diffscale.training.learner import Learner, LossScale
from diffscale.training.numerics import Numerics
from diffscale.training.optimizer import create_optimizer, parameter_groups
from diffscale.training.parallel import World
from diffscale.training.step import Step

from .small import BATCH, experiment


def learner(storage: Path, dataset: Dataset, numerics: Numerics = Numerics(), **changes: Any) -> Learner:  # noqa: B008
    e = experiment(storage, **changes)
    torch.manual_seed(e.train.seed)
    model = build_model(e, dataset)
    return Learner(model, build_diffusion(e, dataset), e, World(), numerics, dataset.num_classes, None)


def batches(dataset: Dataset, count: int, start: int = 0) -> list[Batch]:
    with Loader(dataset, seed=0, global_batch=BATCH, start=start, flip=True, verify=False) as loader:
        return [batch for batch, _ in zip(loader, range(count), strict=False)]


def steps(of: Learner, data: list[Batch]) -> list[Step]:
    return [of.step(batch) for batch in data]


def weights(of: Learner) -> torch.Tensor:
    return torch.cat([p.detach().reshape(-1) for p in of.model.parameters()])


def test_accumulation_is_one_batch(shared_storage: Path, dataset: Dataset) -> None:
    data = batches(dataset, 10)
    whole, parts = learner(shared_storage, dataset), learner(shared_storage, dataset, train={"micro_batch": 5})
    losses = [s.loss for s in steps(whole, data)]
    assert [s.loss for s in steps(parts, data)] == pytest.approx(losses, rel=1e-6)


def test_the_optimizers_step_is_adamw_on_the_mean_loss(shared_storage: Path, dataset: Dataset) -> None:
    """Against torch's AdamW and clip_grad_norm_ written out."""
    from diffscale.diffusion import training_loss

    ours = learner(shared_storage, dataset, optim={"clip_grad_norm": 0.05})
    theirs = learner(shared_storage, dataset)
    model = theirs.model
    optimizer = torch.optim.AdamW(parameter_groups(model, 0.01), lr=2e-4, betas=(0.9, 0.99), eps=1e-8)
    for batch in batches(dataset, 3):
        norm = ours.step(batch).grad_norm
        u, noise, label, _ = theirs.draw_noise(batch.positions, batch.images.shape[1:], batch.labels)
        loss = training_loss(theirs.diffusion, model, batch.images, u=u, noise=noise, label=label).loss.mean()
        optimizer.zero_grad()
        loss.backward()
        assert float(torch.nn.utils.clip_grad_norm_(model.parameters(), 0.05)) == pytest.approx(norm, rel=1e-4)
        optimizer.step()
    assert torch.allclose(weights(ours), weights(theirs), atol=2e-6)


def test_a_batch_that_is_not_finite_changes_nothing_but_the_clock(shared_storage: Path, dataset: Dataset) -> None:
    good, bad = batches(dataset, 2)
    images = bad.images.clone()
    images[3, 0, 0, 0] = torch.nan
    of = learner(shared_storage, dataset)
    of.step(good)
    before = weights(of)
    step = of.step(dataclasses.replace(bad, images=images))
    assert step.skipped
    assert torch.equal(weights(of), before)
    assert step.images_seen == 2 * BATCH


def test_noise_belongs_to_the_sample(shared_storage: Path, dataset: Dataset) -> None:
    of = learner(shared_storage, dataset)
    positions, labels = torch.arange(BATCH), torch.zeros(BATCH, dtype=torch.int64)
    whole = of.draw_noise(positions, (3, 8, 8), labels)
    part = of.draw_noise(positions[5:9], (3, 8, 8), labels[5:9])
    assert torch.equal(whole[0][5:9], part[0])
    assert torch.equal(whole[1][5:9], part[1])


def test_quartiles_sum_to_the_loss(shared_storage: Path, dataset: Dataset) -> None:
    step = learner(shared_storage, dataset).step(batches(dataset, 1)[0])
    assert sum(step.quartile_sums) / BATCH == pytest.approx(step.loss)
    assert step.quartile_counts == (3, 3, 3, 3)  # stratified over the global batch


def test_activation_checkpointing_changes_nothing(shared_storage: Path, dataset: Dataset) -> None:
    data = batches(dataset, 3)
    plain, checkpointed = learner(shared_storage, dataset), learner(shared_storage, dataset)
    checkpointed.model.set_activation_checkpointing(True)  # type: ignore[operator]
    steps(plain, data)
    steps(checkpointed, data)
    assert torch.equal(weights(plain), weights(checkpointed))


@pytest.mark.parametrize("precision", ["bf16", "tf32"])
def test_lower_precision_stays_near(shared_storage: Path, dataset: Dataset, precision: str) -> None:
    data = batches(dataset, 3)
    low = learner(shared_storage, dataset, Numerics(precision=precision), train={"precision": precision})  # type: ignore[arg-type]
    exact = [s.loss for s in steps(learner(shared_storage, dataset), data)]
    assert [s.loss for s in steps(low, data)] == pytest.approx(exact, rel=0.02)


def test_the_loss_scale_halves_where_gradients_overflow_and_doubles_after_2000_good_steps() -> None:
    scale, yes, no = LossScale(torch.device("cpu"), value=8.0), torch.tensor(True), torch.tensor(False)
    scale.update(finite=no, counts=no)
    assert scale.value == 8
    scale.update(finite=no, counts=yes)
    assert scale.value == 4
    for _ in range(1999):
        scale.update(finite=yes, counts=yes)
    assert scale.value == 4
    scale.update(finite=yes, counts=yes)
    assert scale.value == 8
    assert scale.good == 0


def test_a_scaled_loss_gives_the_same_weights_and_an_overflow_halves_the_scale(
    shared_storage: Path, dataset: Dataset
) -> None:
    """As fp16 trains on a GPU; a scale that is a power of two rounds nothing."""
    data = batches(dataset, 3)
    plain, scaled = (learner(shared_storage, dataset, optim={"clip_grad_norm": 0.05}) for _ in range(2))
    scaled.scale = LossScale(torch.device("cpu"), value=2.0**10)
    for a, b in zip(steps(plain, data[:2]), steps(scaled, data[:2]), strict=True):
        assert (a.loss, a.grad_norm) == pytest.approx((b.loss, b.grad_norm), rel=1e-6)
    assert torch.allclose(weights(plain), weights(scaled), atol=1e-7)
    before = weights(scaled)
    scaled.scale.value.fill_(2.0**127)
    step = scaled.step(data[2])
    assert step.overflow
    assert not step.skipped
    assert torch.equal(weights(scaled), before)
    assert scaled.scale.value == 2.0**126


def test_norms_biases_and_embeddings_do_not_decay(shared_storage: Path, dataset: Dataset) -> None:
    model = learner(shared_storage, dataset).model
    decayed, plain = parameter_groups(model, 0.01)
    names = {id(p): n for n, p in model.named_parameters()}
    assert all(p.ndim >= 2 for p in decayed["params"])
    assert not any("embed_label" in names[id(p)] for p in decayed["params"])
    assert len(decayed["params"]) + len(plain["params"]) == len(names)


@pytest.mark.parametrize("name", ["adamw", "lamb", "muon", "lion", "sgd"])
def test_timms_optimizers_learn(shared_storage: Path, dataset: Dataset, name: str) -> None:
    of = learner(shared_storage, dataset, optim={"name": name, "lr": 1e-3})
    before = weights(of)
    assert not any(s.skipped for s in steps(of, batches(dataset, 2)))
    assert not torch.equal(weights(of), before)


def test_an_unknown_optimizer_names_the_nearest(shared_storage: Path, dataset: Dataset) -> None:
    of = learner(shared_storage, dataset)
    with pytest.raises(UserError, match="adamw"):
        create_optimizer(of.model, experiment(shared_storage, optim={"name": "adamv"}).optim)
