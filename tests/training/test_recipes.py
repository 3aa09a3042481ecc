"""Every recipe trains and samples: two steps and a few levels of a network that is small and otherwise the recipe's."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from diffscale.config.experiment import Experiment
from diffscale.config.factory import build_diffusion, build_model, build_solver, check_sampling
from diffscale.config.load import load_tree, merge, validate
from diffscale.config.recipes import recipes
from diffscale.core.errors import UserError
from diffscale.diffusion import keyed_noise, sample
from diffscale.models import PRESETS
from diffscale.training.checkpoint import layout as ck
from diffscale.training.learner import Learner
from diffscale.training.parallel import World
from diffscale.training.run import count
from diffscale.training.settings_check import check_settings
from diffscale.training.trainer import Trainer

ALL = list(recipes())
OF_PIXELS = [name for name in ALL if "latents" not in recipes()[name].data]
SMALL: dict[str, dict[str, Any]] = {
    "unet": {"model_channels": 16, "channel_mult": [1, 2], "num_blocks": 1, "attn_resolutions": [8], "stem_channels": 0}
    | {"num_heads": 1},
    "edm2": {"model_channels": 16, "channel_mult": [1, 2], "num_blocks": 1, "attn_resolutions": [8]}
    | {"channels_per_head": 16},
} | {
    name: {k: v for k, v in PRESETS[f"{name}-tiny"].items() if k not in ("name", "resolution")}
    for name in ("uvit", "rin", "dit", "jit", "hdit")
}
BATCH = 4


def shrunken(name: str, **changes: Any) -> tuple[Experiment, Any]:
    """The recipe with a small network, on images of 16 pixels (32 for the networks that need it) in four classes."""
    tree = load_tree(name)
    backbone = tree["model"]["name"]
    small = SMALL[backbone] | ({"out_channels": 6} if tree["model"].get("out_channels") else {})
    side = 16 if backbone in ("unet", "edm2") else 32
    data = {"path": "builtin:emoji", "resolution": side}
    tree = merge(tree, {"data": data, "model": small, "train": {"global_batch": BATCH, "precision": "fp32"}})
    tree = merge(tree, changes)
    return validate(tree), SimpleNamespace(resolution=side, channels=3, num_classes=4)


@pytest.mark.parametrize("name", ALL)
def test_a_recipe_trains_and_samples(name: str) -> None:
    experiment, data = shrunken(name)
    diffusion = build_diffusion(experiment, data)
    check_sampling(experiment, diffusion)
    torch.manual_seed(0)
    model = build_model(experiment, data)
    learner = Learner(model, diffusion, experiment, num_classes=experiment.num_classes(data), end=1000)
    before = {key: value.detach().clone() for key, value in model.named_parameters()}
    for step in range(2):
        batch = SimpleNamespace(
            images=torch.rand(BATCH, 3, data.resolution, data.resolution) * 2 - 1,
            labels=torch.arange(BATCH),
            positions=torch.arange(BATCH) + BATCH * step,
        )
        extra = {"augment_label": torch.zeros(BATCH, 9)} if experiment.data.augment else None
        result = learner.step(batch, extra=extra)
        assert not result.skipped
    assert any(not torch.equal(before[key], value) for key, value in model.named_parameters())

    solver = replace(build_solver(experiment), steps=3)
    noise = torch.randn(2, 3, data.resolution, data.resolution)
    noise_fn = keyed_noise(0, torch.arange(2), tuple(noise.shape[1:]))
    label = torch.tensor([0, 1]) if model.num_classes else None
    image = sample(diffusion, model.eval(), noise, solver=solver, label=label, noise_fn=noise_fn)
    assert torch.isfinite(image).all()


@pytest.mark.slow
@pytest.mark.parametrize("name", OF_PIXELS)
def test_a_recipe_runs_from_its_data_to_a_checkpoint(name: str, tmp_path: Path) -> None:
    """With the loader's mirror and augmentation, the rate's warm-up, the averages, and numerics left to `auto`."""
    train = {"images": 3 * BATCH, "trackers": [], "gpu": False}
    experiment, _ = shrunken(name, storage=str(tmp_path), train=train, eval={"metrics": [], "n_generated": 0})
    dataset = check_settings(experiment)
    folder = experiment.run_folder(dataset.content_hash)
    Trainer(experiment, folder, World(), count(experiment, dataset)).run()
    (checkpoint,) = ck.list_checkpoints(folder)
    assert ck.read_state(checkpoint)["images_seen"] == 3 * BATCH


CHANNELS: list[tuple[str, dict[str, Any], str]] = [
    ("iddpm-cifar10", {"diffusion": {"variance": "fixed"}}, "diffusion.variance=learned_range"),
    ("ddpm-cifar10", {"diffusion": {"variance": "learned_range"}}, "model.out_channels=6"),
    ("rin-cifar10", {"diffusion": {"variance": "learned_range"}}, "diffusion.variance=fixed"),
    ("ddpm-cifar10", {"model": {"image_channels": 3}}, "an upsampler"),
    ("dit-xl-2", {"model": {"out_channels": 8}}, "6 for images of 3 channels"),
]


@pytest.mark.parametrize(("name", "changes", "said"), CHANNELS, ids=[f"{n}: {s}" for n, _, s in CHANNELS])
def test_a_network_whose_channels_do_not_fit_is_refused(name: str, changes: dict[str, Any], said: str) -> None:
    experiment, data = shrunken(name, **changes)
    with pytest.raises(UserError) as caught:
        build_model(experiment, data)
    assert said in caught.value.text()


@pytest.mark.parametrize(
    ("name", "solver", "said"),
    [
        ("ddpm-cifar10", {"variance": "learned"}, "learned_range"),
        ("ddpm-cifar10", {"steps": 1001}, "1000 numbered steps"),
        ("edm-cifar10", {"grid": "respaced"}, "0 numbered steps"),
    ],
)
def test_a_sampler_that_the_process_does_not_have_is_refused(name: str, solver: dict[str, Any], said: str) -> None:
    experiment, data = shrunken(name, eval={"solver": solver})
    with pytest.raises(UserError) as caught:
        check_sampling(experiment, build_diffusion(experiment, data))
    assert said in caught.value.text()
