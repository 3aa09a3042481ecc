"""What is built from settings: a network makes no pass for a state that nothing uses."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch

from diffscale.config.factory import build_model
from diffscale.config.load import load_experiment
from diffscale.diffusion import SOLVERS, create_diffusion, sample, training_loss
from diffscale.models.cost import Cost, count_cost

TINY = ["model.interface_width=16", "model.latents=6", "model.latent_width=32", "model.num_blocks=1"]
TINY += ["model.patch_size=4", "model.latent_heads=4", "model.rw_heads=2"]


class Images(NamedTuple):
    resolution: int = 16
    channels: int = 3
    num_classes: int = 0


def rin(*overrides: str) -> torch.nn.Module:
    return build_model(load_experiment("quickstart-rin", [*TINY, *overrides]), Images())  # type: ignore[arg-type]


def passes(model: torch.nn.Module) -> tuple[int, int]:
    """Forward passes of one training step and of three steps of sampling."""
    calls: list[Any] = []
    model.register_forward_pre_hook(lambda module, arguments: calls.append(arguments[3:]))
    x = torch.zeros(2, 3, 16, 16)
    keep = torch.tensor([True, False]) if getattr(model, "carries_state", False) else None
    training_loss(create_diffusion(), model, x, u=torch.tensor([0.3, 0.7]), noise=x, self_cond_keep=keep)
    training = len(calls)
    sample(create_diffusion(), model, torch.randn(2, 3, 16, 16), solver=SOLVERS["ddim"](steps=3))
    if not getattr(model, "carries_state", False):
        assert all(state is None for (state,) in calls)
    return training, len(calls) - training


def cost(*overrides: str) -> Cost:
    return count_cost(lambda: rin(*overrides), 16, 3, 0)


@pytest.mark.parametrize(
    ("override", "training"),
    [
        ("diffusion.self_condition=0.9", 2),
        ("diffusion.self_condition=0", 1),
        ("model.self_conditioning=false", 1),
    ],
)
def test_a_state_that_nothing_uses_costs_no_pass(override: str, training: int) -> None:
    assert passes(rin(override)) == (training, 3)
    found = cost(override)
    # Forward and backward are three forward passes, less the gradient of the first layer's input.
    assert found.flops_per_image / (2 * found.forward_macs) == pytest.approx(training + 2, abs=0.15)


def test_only_rin_carries_state() -> None:
    assert load_experiment("quickstart-rin").carries_state
    assert not load_experiment("quickstart-unet").carries_state
