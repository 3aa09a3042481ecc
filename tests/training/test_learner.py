from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from diffscale.config.experiment import OptimSettings
from diffscale.config.factory import build_diffusion, build_model
from diffscale.core.errors import UserError
from diffscale.data import Batch, Dataset, Loader
from diffscale.models.rin import RIN
from diffscale.training.learner import Learner, LossScale
from diffscale.training.numerics import Numerics
from diffscale.training.optimizer import Update, check_optimizer, create_optimizer, parameter_groups
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


@pytest.mark.parametrize(("decay_on", "plain"), [("weights", 3), ("matrices", 1), ("all", 0)])
def test_what_decays_is_a_setting(decay_on: Any, plain: int) -> None:
    model = nn.ModuleDict({"linear": nn.Linear(2, 3), "table": nn.Embedding(4, 2)})
    model.positions = nn.Parameter(torch.zeros(5, 2))  # type: ignore[assignment]
    model.no_weight_decay = lambda: {"positions"}  # type: ignore[assignment]
    groups = parameter_groups(model, 0.01, decay_on)
    assert [len(group["params"]) for group in groups] == [n for n in (4 - plain, plain) if n]
    assert [group["weight_decay"] for group in groups] == [0.01, 0.0][: len(groups)]


def lamb_as_published(weights: Tensor, gradients: list[Tensor], lr: float, decay: float, adapt: bool) -> Tensor:
    """LAMB (You et al. 2019, algorithm 2) with φ the identity and Adam's bias corrections, in float64."""
    weights = weights.double()
    m, v = torch.zeros_like(weights), torch.zeros_like(weights)
    for step, gradient in enumerate(gradients, start=1):
        m = 0.9 * m + 0.1 * gradient.double()
        v = 0.999 * v + 0.001 * gradient.double() ** 2
        update = m / (1 - 0.9**step) / ((v / (1 - 0.999**step)).sqrt() + 1e-6) + decay * weights
        weights = weights - lr * (weights.norm() / update.norm() if adapt else 1) * update
    return weights


@pytest.mark.parametrize("decay", [0.0, 0.01])
def test_lamb_as_published(decay: float) -> None:
    """Positions are decayed and adapted, nothing clips the gradient, the trust ratio does not need weight decay."""
    torch.manual_seed(0)
    model = RIN(8, patch_size=4, interface_width=8, latents=4, latent_width=8, latent_heads=2, rw_heads=2, layers=1)
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    gradients = [{name: 10 * torch.randn_like(p) for name, p in start.items()} for _ in range(4)]
    optim = OptimSettings(
        name="lamb",
        lr=0.01,
        betas=(0.9, 0.999),
        eps=1e-6,
        weight_decay=decay,
        decay_on="matrices",
        trust_ratio="always",
        clip_grad_norm=None,
    )
    optimizer = create_optimizer(model, optim)
    for step in gradients:
        for name, p in model.named_parameters():
            p.grad = step[name].clone()
        optimizer.step()
    for name, p in model.named_parameters():
        matrix = p.ndim >= 2
        expected = lamb_as_published(
            start[name], [step[name] for step in gradients], 0.01, decay if matrix else 0.0, matrix
        )
        torch.testing.assert_close(p.detach().double(), expected, rtol=1e-4, atol=1e-6, msg=name)


def test_a_trust_ratio_is_refused_for_optimizers_without_one() -> None:
    with pytest.raises(UserError, match=r"optim\.trust_ratio"):
        check_optimizer(OptimSettings(name="muon", trust_ratio="always"))


@pytest.mark.parametrize("name", ["adamw", "lamb", "muon", "lion", "sgd"])
def test_timms_optimizers_learn(shared_storage: Path, dataset: Dataset, name: str) -> None:
    of = learner(shared_storage, dataset, optim={"name": name, "lr": 1e-3})
    before = weights(of)
    assert not any(s.skipped for s in steps(of, batches(dataset, 2)))
    assert not torch.equal(weights(of), before)


def test_muon_orthogonalises_in_the_precision_of_the_run() -> None:
    """A processor without bf16 instructions emulates them: Muon was 93 % of a step."""

    def after_a_step(products: torch.dtype) -> Tensor:
        torch.manual_seed(0)
        model = nn.Linear(48, 64, bias=False)
        update = Update(model, OptimSettings(name="muon", lr=0.1), torch.device("cpu"), products)
        model.weight.grad = torch.randn(64, 48)
        update.step(torch.tensor(0.1, dtype=torch.float64), torch.tensor(True))
        return model.weight.detach()

    exact = after_a_step(torch.float64)
    assert (after_a_step(torch.float32) - exact).abs().max() < 1e-6
    assert (after_a_step(torch.bfloat16) - exact).abs().max() > 1e-5
    assert Numerics(precision="fp32").products == torch.float32
    assert Numerics(precision="bf16").products == torch.bfloat16  # as published


def test_an_unknown_optimizer_names_the_nearest(shared_storage: Path, dataset: Dataset) -> None:
    of = learner(shared_storage, dataset)
    with pytest.raises(UserError, match="adamw"):
        create_optimizer(of.model, experiment(shared_storage, optim={"name": "adamv"}).optim)
