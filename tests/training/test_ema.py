from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from diffscale.config.experiment import EmaSettings
from diffscale.config.load import load_experiment, preset_names
from diffscale.core.errors import UserError
from diffscale.training.ema import (
    Ema,
    check_average,
    ema_name,
    exponent,
    halflife_beta,
    power_beta,
    profile_error,
    reconstruct,
)


@pytest.mark.parametrize(("std", "gamma"), [(0.05, 16.972199), (0.10, 6.937204)])
def test_exponents_are_edm2s(std: float, gamma: float) -> None:
    """Karras et al. 2024 (EDM2), computed with the authors' code."""
    assert exponent(std) == pytest.approx(gamma, abs=1e-6)


@pytest.mark.parametrize("std", [0.0, 0.3, -1.0])
def test_a_width_that_no_power_function_has_is_refused(std: float) -> None:
    with pytest.raises(ValueError, match="ema width"):
        exponent(std)


def test_the_halflife_is_where_half_is_forgotten() -> None:
    settings = EmaSettings(halflife_images=100, halflife_fraction=None)
    assert halflife_beta(settings, images_seen=10**6, images=100) == pytest.approx(0.5)
    assert halflife_beta(settings, images_seen=200, images=10) == pytest.approx(0.5)  # warm-up: 5 % of images seen
    constant = EmaSettings(halflife_images=100, halflife_fraction=None, ramp=None)
    assert halflife_beta(constant, images_seen=100, images=100) == pytest.approx(0.5)


def test_the_average_is_the_closed_form_of_a_power_function() -> None:
    """The average at t is the integral of (gamma+1) tau^gamma / t^(gamma+1) over what the weights were: of w(tau) = tau
    it is t (gamma+1)/(gamma+2)."""
    gamma, total, step = exponent(0.1), 20_000, 2
    model = nn.Linear(1, 1, bias=False)
    ema = Ema(model, EmaSettings(power=(0.1,)))
    for seen in range(step, total + 1, step):
        model.weight.data.fill_(seen)
        ema.update(torch.tensor(ema.shares(seen, step)))
    assert float(ema.averages["std0.100"]["weight"]) == pytest.approx(total * (gamma + 1) / (gamma + 2), rel=1e-3)


def test_the_first_step_of_a_power_average_forgets_the_random_start() -> None:
    assert power_beta(exponent(0.05), images_seen=64, images=64) == 0


def test_a_stored_average_comes_back_exactly() -> None:
    stored = [(0.05, 100), (0.1, 100), (0.05, 200), (0.1, 200)]
    assert reconstruct(stored, (0.1, 200)).tolist() == [0, 0, 0, 1]


def test_reconstruction_matches_the_average_that_training_would_have_tracked() -> None:
    """0.07 tracked directly against 0.05 and 0.10 stored at ten times, on a random walk."""
    torch.manual_seed(0)
    model = nn.Linear(50, 1, bias=False)
    ema = Ema(model, EmaSettings(power=(0.05, 0.07, 0.1), halflife_fraction=None))
    stored, tensors = [], []
    for seen in range(10, 10_001, 10):
        model.weight.data.add_(torch.randn(1, 50))
        ema.update(torch.tensor(ema.shares(seen, 10)))
        if seen % 1000 == 0:
            for std in (0.05, 0.1):
                stored.append((std, seen))
                tensors.append(ema.averages[f"std{std:.3f}"]["weight"].clone())
    weights = reconstruct(stored, (0.07, 10_000))
    assert weights.sum() == pytest.approx(1)
    made = sum(float(w) * t for w, t in zip(weights, tensors, strict=True))
    wanted = ema.averages["std0.070"]["weight"]
    assert float((made - wanted).norm() / (model.weight - wanted).norm()) < 0.05
    assert profile_error(stored, (0.07, 10_000), weights) < 0.05


def test_later_averages_are_not_used() -> None:
    with pytest.raises(ValueError, match="at or before"):
        reconstruct([(0.05, 300)], (0.07, 200))


def test_names() -> None:
    assert [ema_name(n) for n in ("none", "halflife", "0.05")] == ["none", "halflife", "std0.050"]
    assert ema_name("std0.100") == "std0.100"
    with pytest.raises(ValueError, match="relative width"):
        ema_name("half")


def test_an_average_that_is_not_tracked_is_no_average() -> None:
    """The weights of training took its place before, under its name."""
    ema = Ema(nn.Linear(2, 1), EmaSettings(power=(0.1,)))
    assert set(ema.average("halflife")) == {"weight", "bias"}
    with pytest.raises(UserError, match=r"one of: none, halflife, std0\.100"):
        ema.average("std0.050")


@pytest.mark.parametrize(
    ("ema", "tracked", "refused"),
    [
        ("none", {"halflife_fraction": None}, False),
        ("halflife", {}, False),
        ("halflife", {"halflife_fraction": None, "halflife_images": 640}, False),
        ("halflife", {"halflife_fraction": None, "power": [0.05]}, True),
        ("std0.05", {}, True),
        ("0.05", {"power": [0.05, 0.1]}, False),
        ("0.07", {"power": [0.05, 0.1]}, True),
        ("half", {}, True),
    ],
)
def test_evaluating_an_average_that_training_does_not_track_is_refused(
    ema: str, tracked: dict[str, object], refused: bool
) -> None:
    e = load_experiment(
        "quickstart-unet", [f"eval.ema={ema}", *(f"train.ema.{k}={_yaml(v)}" for k, v in tracked.items())]
    )
    if not refused:
        check_average(e)
        return
    with pytest.raises(UserError, match=r"eval\.ema"):
        check_average(e)


def test_dry_run_refuses_it_with_exit_code_2(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "diffscale.train", "quickstart-unet", "eval.ema=std0.05", f"storage={tmp_path}"]
    run = subprocess.run([*command, "--dry-run"], capture_output=True, text=True, timeout=300, check=False)
    assert run.returncode == 2, run.stderr
    assert "eval.ema" in run.stderr + run.stdout
    assert "Traceback" not in run.stderr


@pytest.mark.parametrize("name", preset_names("presets"))
def test_every_preset_evaluates_weights_that_it_tracks(name: str) -> None:
    check_average(load_experiment(name, ["data.path=/data"]))  # recipes leave it to the user


def _yaml(value: object) -> str:
    return "null" if value is None else str(value)
