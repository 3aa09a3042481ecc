"""Every preset network makes a real training step, as the table in diffscale/models/README.md says."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from diffscale.config.factory import build_diffusion, build_model
from diffscale.config.load import validate
from diffscale.core.errors import UserError
from diffscale.interchange.preset_support import TRIED_WHOLE, settings_of
from diffscale.models import PRESETS, create_model
from diffscale.training.learner import Learner

BATCH = 2
NARROW: dict[str, dict[str, Any]] = {
    "unet": {"model_channels": 32, "channels_per_head": 32},
    "edm2": {"model_channels": 32, "channels_per_head": 32},
    "uvit": {"width": 64, "depth": 2, "num_heads": 2, "embedding_width": 64},
    "rin": {"interface_width": 64, "latents": 16, "latent_width": 128, "num_blocks": 2, "layers": 1},
    "dit": {"width": 64, "depth": 2, "num_heads": 2},
    "jit": {"width": 96, "num_heads": 2, "bottleneck": 32},
    "hdit": {"mapping_width": 64},
}
"""Settings that make a network narrow; lists of widths are divided by about eight."""


def parameters(name: str) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in create_model(name).parameters())


def narrow(name: str) -> dict[str, Any]:
    """The settings that change: none for a network that is small enough."""
    if parameters(name) <= TRIED_WHOLE:
        return {}
    settings = settings_of(name)
    lists = {k: [max(w // 512, 1) * 64 for w in settings[k]] for k in ("widths", "conv_widths") if k in settings}
    return NARROW[PRESETS[name]["name"]] | lists


def smallest_side(name: str, changes: dict[str, Any]) -> int:
    """The first of these sides at which the network can be built."""
    for side in (16, 32, 64, 128):
        try:
            with torch.device("meta"):
                create_model(name, **{**changes, "resolution": side})
        except ValueError:
            continue
        return side
    raise AssertionError(f"{name} cannot be built at 128 pixels")


def prepared(name: str) -> tuple[Any, Any]:
    """Settings and data of a step: the preset at its smallest side, with a learned variance if it has the channels."""
    preset, changes = PRESETS[name], narrow(name)
    channels = preset.get("channels", 3)
    learned = preset.get("out_channels", 0) == 2 * channels
    side, classes = smallest_side(name, changes), min(preset.get("num_classes", 0), 10)
    diffusion = {"schedule": "ddpm_linear", "discrete": True, "variance": "learned_range"} if learned else {}
    ema = {"halflife_images": None, "halflife_fraction": None, "power": []}
    tree = {
        "name": "step",
        "data": {"path": "builtin:emoji", "resolution": side, "class_conditional": classes > 0},
        "model": {"preset": name, **changes},
        "diffusion": diffusion,
        "train": {"global_batch": BATCH, "precision": "fp32", "images": 1000, "ema": ema},
    }
    return validate(tree), SimpleNamespace(resolution=side, channels=channels, num_classes=classes)


@pytest.mark.parametrize(
    "name",
    [name if "tiny" in name else pytest.param(name, marks=pytest.mark.slow) for name in PRESETS if "-to-" not in name],
)
def test_a_preset_makes_a_step(name: str) -> None:
    experiment, data = prepared(name)
    torch.manual_seed(0)
    model = build_model(experiment, data)
    classes = experiment.num_classes(data)
    learner = Learner(model, build_diffusion(experiment, data), experiment, num_classes=classes, end=1000)
    before = {key: value.detach().norm() for key, value in model.named_parameters()}
    batch = SimpleNamespace(
        images=torch.rand(BATCH, data.channels, data.resolution, data.resolution) * 2 - 1,
        labels=torch.zeros(BATCH, dtype=torch.int64),
        positions=torch.arange(BATCH),
    )
    augmented = getattr(model, "augment_dim", 0) or getattr(experiment.model, "augment_dim", 0)
    result = learner.step(batch, extra={"augment_label": torch.zeros(BATCH, augmented)} if augmented else None)
    assert not result.skipped
    assert any(value.norm() != before[key] for key, value in model.named_parameters())


def test_the_upsampler_is_refused() -> None:
    experiment, data = prepared("adm-imagenet64-to-256")
    with pytest.raises(UserError, match="an upsampler"):
        build_model(experiment, data)
