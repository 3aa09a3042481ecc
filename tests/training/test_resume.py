"""A resumed run is the same run, for every network, optimizer and way to compute: weights, averages, moments."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from timm.optim import list_optimizers
from torch import Tensor, nn

from diffscale.config.experiment import OptimSettings
from diffscale.config.factory import build_diffusion, build_model
from diffscale.data import Dataset
from diffscale.training.checkpoint import layout as ck
from diffscale.training.checkpoint import saver as saving
from diffscale.training.checkpoint import state
from diffscale.training.checkpoint.restore import restore
from diffscale.training.checkpoint.tensors import read_group, write_group
from diffscale.training.learner import Learner
from diffscale.training.numerics import Numerics, winograd_available
from diffscale.training.optimizer import create_optimizer
from diffscale.training.parallel import World

from .small import BATCH, experiment
from .test_learner import batches

MODELS = {
    "unet": {"name": "unet", "model_channels": 16, "channel_mult": [1, 2], "num_blocks": 1, "attn_resolutions": [4]},
    "edm2": {"name": "edm2", "model_channels": 16, "channel_mult": [1, 2], "num_blocks": 1, "channels_per_head": 16},
    "uvit": {
        "name": "uvit",
        "conv_widths": [16],
        "conv_blocks": 1,
        "width": 32,
        "depth": 2,
        "num_heads": 2,
        "embedding_width": 32,
    },
    "rin": {
        "name": "rin",
        "patch_size": 2,
        "interface_width": 32,
        "latents": 8,
        "latent_width": 32,
        "latent_heads": 2,
        "rw_heads": 2,
        "num_blocks": 1,
        "layers": 1,
    },
    "dit": {"name": "dit", "patch_size": 2, "width": 32, "depth": 2, "num_heads": 2},
    "jit": {
        "name": "jit",
        "patch_size": 2,
        "bottleneck": 16,
        "width": 32,
        "depth": 2,
        "num_heads": 2,
        "context_start": 1,
    },
    "hdit": {"preset": "hdit-tiny"},
}
NUMERICS = [
    Numerics(precision, channels_last, winograd=winograd)
    for precision, (channels_last, winograd) in product(("fp32", "bf16"), ((False, False), (True, False), (True, True)))
]
# They need a GPU and another package, or the settings refuse them.
NOT_HERE = ("bnb", "fused", "adahessian", "kron")


def name_of(value: object) -> str:
    if not isinstance(value, Numerics):
        return str(value)
    return "-".join([value.precision, *(k for k in ("channels_last", "winograd", "compile") if getattr(value, k))])


def make(storage: Path, dataset: Dataset, model: str, numerics: Numerics, optim: str, seed: int = 0) -> Learner:
    changes = {"model": MODELS[model], "optim": {"name": optim, "lr": 1e-3}, "train": {"compile": numerics.compile}}
    e = experiment(storage, **changes)
    torch.manual_seed(seed)
    network = numerics.prepare(build_model(e, dataset))
    return Learner(network, build_diffusion(e, dataset), e, World(), numerics, dataset.num_classes, None)


def tensors(of: Learner) -> dict[str, Tensor]:
    """Weights, averages and optimizer state, by the names of a checkpoint."""
    snapshot = saving.snapshot(of, {}, 0)
    assert snapshot is not None
    return {f"{group}:{name}": t for group, held in snapshot.groups.items() for name, t in held.tensors.items()}


def resumed(of: Learner, make_again: Callable[[], Learner], folder: Path) -> Learner:
    """Another learner that knows nothing but the checkpoint of the first."""
    saver = saving.Saver(str(folder), 0, 1, "test", ck.save_settings(of.experiment), lambda _: None)
    saver.save(saving.snapshot(of, {"record": {}, "data": {}}, 0))
    saver.wait()
    again = make_again()
    restore(again, ck.folder_of(str(folder), of.images_seen))
    return again


def check(storage: Path, dataset: Dataset, folder: Path, model: str, numerics: Numerics, optim: str) -> None:
    if numerics.winograd and not winograd_available(numerics.precision, "cpu"):
        pytest.skip(f"no Winograd kernels for {numerics.precision} on this machine")
    data = batches(dataset, 6)
    calm, other = (make(storage, dataset, model, numerics, optim) for _ in range(2))
    for i, batch in enumerate(data):
        calm.step(batch)
        if i in (2, 4):  # killed twice
            other = resumed(other, lambda: make(storage, dataset, model, numerics, optim, seed=1), folder)
        other.step(batch)
    assert other.images_seen == 6 * BATCH
    want, got = tensors(calm), tensors(other)
    assert want.keys() == got.keys()
    assert [name for name in want if not torch.equal(want[name], got[name])] == []
    assert [name for name in want if want[name].stride() != got[name].stride()] == []


@pytest.mark.parametrize("numerics", NUMERICS, ids=name_of)
@pytest.mark.parametrize("model", MODELS)
def test_every_network_resumes_to_the_same_weights_however_it_computes(
    shared_storage: Path, dataset: Dataset, tmp_path: Path, model: str, numerics: Numerics
) -> None:
    check(shared_storage, dataset, tmp_path, model, numerics, "adamw")


@pytest.mark.parametrize("optim", ["adam", "lamb", "muon", "adafactorbv"])
@pytest.mark.parametrize("model", ["unet", "rin"])
def test_other_optimizers_resume_with_convolutions_in_channels_last_order(
    shared_storage: Path, dataset: Dataset, tmp_path: Path, model: str, optim: str
) -> None:
    check(shared_storage, dataset, tmp_path, model, Numerics(channels_last=True), optim)


@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS)
def test_compiled_networks_resume_to_the_same_weights(
    shared_storage: Path, dataset: Dataset, tmp_path: Path, model: str
) -> None:
    check(shared_storage, dataset, tmp_path, model, Numerics(channels_last=True, compile=True), "adamw")


def convolutions(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    layers = nn.Conv2d(8, 16, 3, padding=1), nn.SiLU(), nn.Conv2d(16, 8, 1), nn.Conv2d(8, 8, 3, padding=1)
    return nn.Sequential(*layers).to(memory_format=torch.channels_last)


@pytest.mark.parametrize("name", [n for n in list_optimizers() if not n.startswith(NOT_HERE)])
def test_every_optimizer_continues_from_its_stored_state(tmp_path: Path, name: str) -> None:
    """State may be in other dtypes than the weights (adafactorbv's momentum is bfloat16) or of other shapes."""

    def step(model: nn.Module, optimizer: torch.optim.Optimizer, i: int) -> None:
        torch.manual_seed(i)
        x, y = torch.randn(2, 4, 8, 8, 8)
        optimizer.zero_grad()
        (model(x) - y).square().mean().backward()
        optimizer.step()

    def optimizer_of(model: nn.Module) -> Any:
        return create_optimizer(model, OptimSettings(name=name, lr=1e-3, weight_decay=0.01))

    model, again = convolutions(0), convolutions(1)
    optimizer, optimizer_again = optimizer_of(model), optimizer_of(again)
    for i in range(3):
        step(model, optimizer, i)
    stored, numbers = state.flatten_optimizer(optimizer, model)
    write_group(str(tmp_path), "state", {k: v.detach() for k, v in stored.items()}, {}, 0, 1)
    with torch.no_grad():
        for mine, theirs in zip(again.parameters(), model.parameters(), strict=True):
            mine.copy_(theirs)
    state.restore_optimizer(optimizer_again, again, read_group(str(tmp_path), "state") if stored else {}, numbers)
    for i in range(3, 6):
        step(model, optimizer, i)
        step(again, optimizer_again, i)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    after, after_again = (state.flatten_optimizer(*pair)[0] for pair in ((optimizer, model), (optimizer_again, again)))
    assert after.keys() == after_again.keys()
    assert all(torch.equal(after[k], after_again[k]) and after[k].dtype == after_again[k].dtype for k in after)
