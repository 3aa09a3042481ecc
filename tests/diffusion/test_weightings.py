"""Loss weightings: their definitions, their conversion, and the combinations that are refused."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from diffscale.diffusion import (
    INTERPOLANTS,
    PREDICTIONS,
    WEIGHTINGS,
    create_diffusion,
    loss_concentration,
    training_loss,
)

from .exact_denoisers import unit_noise

LOGSNR = torch.linspace(-12, 12, 49, dtype=torch.float64)
SNR = LOGSNR.exp()
SIGMA_DATA = 0.5

# Weights on ‖Δx0‖² as their papers write them.
ON_X0 = {
    "uniform_eps": SNR,
    "uniform_x0": torch.ones_like(SNR),
    "uniform_v": 1 + SNR,
    "uniform_u": torch.sigmoid(-LOGSNR / 2) ** -2,
    "min_snr": SNR.clamp(max=5),
    "soft_min_snr": 1 / (1 / SNR + 1 / 4),
    "p2": SNR / (1 + SNR),
    "edm": (1 / SNR + SIGMA_DATA**2) / (SIGMA_DATA**2 / SNR),
    "sigmoid": math.exp(-3) * torch.sigmoid(LOGSNR + 3),
    "learned_uncertainty": (1 / SNR + SIGMA_DATA**2) / (SIGMA_DATA**2 / SNR),
}


@pytest.mark.parametrize("name", WEIGHTINGS)
def test_weights_are_their_papers_on_the_clean_image(name):
    weight = (WEIGHTINGS[name]().log_weight(LOGSNR, SIGMA_DATA) + LOGSNR).exp()
    torch.testing.assert_close(weight, ON_X0[name], rtol=1e-9, atol=0)


@pytest.mark.parametrize("name", WEIGHTINGS)
def test_weights_are_finite_in_float32_at_both_ends(name):
    weight = WEIGHTINGS[name]().log_weight(torch.tensor([-20.0, 20.0]), SIGMA_DATA)
    assert bool(weight.isfinite().all())


@pytest.mark.parametrize(
    ("weighting", "prediction", "interpolant"),
    [
        ("uniform_eps", "eps", "vp"),
        ("uniform_x0", "x0", "ve"),
        ("uniform_v", "v", "vp"),
        ("uniform_u", "u", "linear"),
        ("edm", "F", "ve"),
    ],
)
def test_a_uniform_weight_is_one_on_its_own_output(weighting, prediction, interpolant):
    diffusion = create_diffusion(weighting={"name": weighting}, prediction=prediction, interpolant=interpolant)
    logsnr = torch.linspace(-12, 12, 25, dtype=torch.float64)
    weight = diffusion.log_loss_weight(logsnr, logsnr, *diffusion.alpha_sigma(logsnr))[0]
    torch.testing.assert_close(weight, torch.zeros(25, dtype=torch.float64), rtol=0, atol=1e-9)


def test_jits_velocity_weight_is_limited_where_its_denominator_is():
    weight = (WEIGHTINGS["uniform_u"](sigma_min=0.05).log_weight(LOGSNR, 0.5) + LOGSNR).exp()
    sigma = torch.sigmoid(-LOGSNR / 2)
    torch.testing.assert_close(weight, sigma.clamp(min=0.05) ** -2)


class Zero(nn.Module):
    def forward(self, x_in, logsnr, label=None, state=None):
        return torch.zeros_like(x_in), None


def test_edms_loss_of_a_zero_network_is_1_where_the_data_has_sigma_data():
    diffusion = create_diffusion(
        schedule={"name": "edm_lognormal"}, interpolant="ve", prediction="F", weighting={"name": "edm"}
    )
    u = (torch.arange(64) + 0.5) / 64
    x, noise = 0.5 * unit_noise(64, 3, 64, 64), unit_noise(64, 3, 64, 64, seed=1)
    terms = training_loss(diffusion, Zero(), x, u=u, noise=noise)
    torch.testing.assert_close(terms.loss, torch.ones(64), rtol=0, atol=0.06)  # λ(σ) c_out² = 1
    assert float(terms.loss.mean()) == pytest.approx(1, abs=0.005)


def test_sigmoid_weights_logsnr_itself_whatever_the_schedule():
    # Σ over uniform t of w·(−½ dλ/dt) is ½∫ w dλ, for schedules over the same range
    totals = []
    for name in ("simple_cosine", "iddpm_cosine", "flow_uniform"):
        diffusion = create_diffusion(schedule={"name": name}, weighting={"name": "sigmoid"}, prediction="v")
        t = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000
        logsnr = diffusion.schedule.logsnr(t)
        ones = torch.ones_like(logsnr)
        on_eps = diffusion.log_loss_weight(t, logsnr, ones, torch.exp(-logsnr / 2))  # ve
        low, high = float(logsnr[-1]), float(logsnr[0])
        expected = 0.5 * (math.log1p(math.exp(-3 - low)) - math.log1p(math.exp(-3 - high)))
        total = float((on_eps[0] - on_eps[1] - logsnr).exp().mean())
        totals.append(total / expected)
    assert totals == pytest.approx([1, 1, 1], rel=2e-3)


@pytest.mark.parametrize(
    ("schedule", "prediction", "weighting"),
    [
        ("simple_cosine", "eps", "uniform_v"),
        ("simple_cosine", "eps", "sigmoid"),
        ("simple_cosine", "x0", "uniform_eps"),
        ("iddpm_cosine", "eps", "uniform_x0"),
        ("linear_gamma", "eps", "edm"),
        ("flow_uniform", "x0", "uniform_u"),
    ],
)
def test_a_weight_that_is_singular_in_the_outputs_space_is_refused_with_the_reason(schedule, prediction, weighting):
    with pytest.raises(ValueError, match=r"1 % of the noise levels would hold \d+% of the loss.*Use prediction v"):
        create_diffusion(schedule={"name": schedule}, prediction=prediction, weighting={"name": weighting})


@pytest.mark.parametrize(
    "published",
    [
        {"schedule": {"name": "ddpm_linear"}, "prediction": "eps", "weighting": {"name": "uniform_eps"}},  # DDPM
        {"schedule": {"name": "linear_gamma"}, "prediction": "eps", "weighting": {"name": "uniform_eps"}},  # RIN
        {"schedule": {"name": "simple_cosine"}, "prediction": "v", "weighting": {"name": "uniform_eps"}},  # SiD
        {"schedule": {"name": "simple_cosine"}, "prediction": "v", "weighting": {"name": "sigmoid"}},  # SiD2
        {"schedule": {"name": "edm_lognormal"}, "prediction": "F", "weighting": {"name": "edm"}, "interpolant": "ve"},
        {
            "schedule": {"name": "flow_uniform"},
            "prediction": "u",
            "weighting": {"name": "uniform_u"},
            "interpolant": "linear",
        },
        {  # JiT
            "schedule": {"name": "flow_logit_normal", "mean": 0.8, "std": 0.8},
            "prediction": "x0",
            "weighting": {"name": "uniform_u", "sigma_min": 0.05},
            "interpolant": "linear",
        },
        {"schedule": {"name": "iddpm_cosine"}, "prediction": "x0", "weighting": {"name": "min_snr"}},  # Hang et al.
    ],
)
def test_published_combinations_are_taken(published):
    assert loss_concentration(create_diffusion(**published)) < 0.4


@pytest.mark.parametrize("prediction", ["v", "u", "F"])
@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("interpolant", INTERPOLANTS)
def test_outputs_that_are_nowhere_singular_take_every_weighting(prediction, weighting, interpolant):
    create_diffusion(prediction=prediction, weighting={"name": weighting}, interpolant=interpolant)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"interpolant": "vpp"}, "interpolant = 'vpp': valid are vp, linear, ve"),
        ({"prediction": "epsilon"}, f"valid are {', '.join(PREDICTIONS)}"),
        ({"schedule": {"name": "cosine"}}, "schedule.name = 'cosine': valid are ddpm_linear"),
        ({"schedule": {"name": "simple_cosine", "shift": 3}}, r"unknown \['shift'\]: valid are logsnr_min"),
        ({"weighting": {"name": "min_snr", "gamma": 0.0}}, "min_snr: gamma = 0.0"),
        ({"input_scale": 0.0}, "input_scale = 0.0"),
        ({"sigma_data": math.nan}, "sigma_data = nan"),
        ({"input_range": "0,255"}, "valid are -1,1, 0,1"),
        ({"prediction": "F", "input_std": "none"}, "brings its own c_in"),
    ],
)
def test_unknown_settings_are_refused_by_name(settings, message):
    with pytest.raises(ValueError, match=message):
        create_diffusion(**settings)
