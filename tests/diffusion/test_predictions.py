"""Interpolants, predictions, and the conversions between them."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffscale.diffusion import INTERPOLANTS, PREDICTIONS, convert, from_x0_eps, to_x0_eps
from diffscale.diffusion.predictions import log_error_gain, to_x0

EVERY_INTERPOLANT = pytest.mark.parametrize("interpolant", INTERPOLANTS)
EVERY_PREDICTION = pytest.mark.parametrize("prediction", PREDICTIONS)


def pair(interpolant: str, logsnr: float, dtype=torch.float32):
    return INTERPOLANTS[interpolant](torch.tensor(logsnr, dtype=dtype))


@EVERY_INTERPOLANT
@settings(deadline=None)
@given(logsnr=st.floats(-20, 20, width=32))
def test_all_interpolants_have_the_requested_signal_to_noise_ratio(interpolant, logsnr):
    alpha, sigma = pair(interpolant, logsnr)
    assert float(2 * (alpha.log() - sigma.log())) == pytest.approx(logsnr, rel=2e-6, abs=4e-6)


def test_interpolants_have_their_defining_sums():
    logsnr = torch.linspace(-20, 20, 401)
    alpha, sigma = INTERPOLANTS["vp"](logsnr)
    torch.testing.assert_close(alpha**2 + sigma**2, torch.ones(401))
    alpha, sigma = INTERPOLANTS["linear"](logsnr)
    torch.testing.assert_close(alpha + sigma, torch.ones(401))
    alpha, sigma = INTERPOLANTS["ve"](logsnr)
    assert bool((alpha == 1).all())


@EVERY_INTERPOLANT
def test_predictions_are_what_their_papers_define(interpolant):
    alpha, sigma = pair(interpolant, 0.7, torch.float64)
    x, eps = torch.tensor([0.3, -0.8]).double(), torch.tensor([1.2, 0.4]).double()
    z = alpha * x + sigma * eps
    sigma_data, s = 0.5, sigma / alpha
    c_skip = sigma_data**2 / (s**2 + sigma_data**2)  # EDM, table 1
    c_out = s * sigma_data / (s**2 + sigma_data**2).sqrt()
    expected = {
        "eps": eps,
        "x0": x,
        "v": alpha * eps - sigma * x,
        "u": eps - x,
        "F": (x - c_skip * z / alpha) / c_out,
    }
    for name, value in expected.items():
        torch.testing.assert_close(from_x0_eps(name, x, eps, alpha, sigma, sigma_data), value)
    # solved for x and for eps: z = αx + σε with v = αε − σx, or with u = ε − x
    v, u = expected["v"], expected["u"]
    torch.testing.assert_close((alpha * z - sigma * v) / (alpha**2 + sigma**2), x)
    torch.testing.assert_close((z + alpha * u) / (alpha + sigma), eps)


def test_edms_F_at_sigma_data_1_is_minus_v():
    x, eps = torch.randn(2, 100, dtype=torch.float64)
    alpha, sigma = pair("vp", -1.3, torch.float64)
    F, v = (from_x0_eps(name, x, eps, alpha, sigma, 1.0) for name in ("F", "v"))
    torch.testing.assert_close(F, -v)


@EVERY_INTERPOLANT
@settings(deadline=None, max_examples=60)
@given(
    logsnr=st.floats(-20, 20, width=32),
    names=st.tuples(st.sampled_from(sorted(PREDICTIONS)), st.sampled_from(sorted(PREDICTIONS))),
    x=st.floats(-1, 1, width=32),
    eps=st.floats(-4, 4, width=32),
)
def test_any_prediction_converts_to_any_other_in_float32(interpolant, logsnr, names, x, eps):
    source, target = names
    alpha, sigma = pair(interpolant, logsnr)
    x, eps = torch.tensor(x), torch.tensor(eps)
    z = alpha * x + sigma * eps
    expected = from_x0_eps(target, x, eps, alpha, sigma, 0.5)
    got = convert(source, target, z, from_x0_eps(source, x, eps, alpha, sigma, 0.5), alpha, sigma)
    # x0 from eps loses e^(−logsnr/2) of precision as the signal vanishes, eps from x0 e^(logsnr/2) as the noise does
    loss = {"eps": math.exp(max(0.0, -logsnr / 2)), "x0": math.exp(max(0.0, logsnr / 2))}.get(source, 1.0)
    tolerance = 2e-6 * loss * max(1.0, abs(expected), *(() if interpolant != "ve" else (math.exp(-logsnr / 2),)))
    assert float((got - expected).abs()) <= max(tolerance, 1e-5)


@EVERY_INTERPOLANT
@EVERY_PREDICTION
def test_error_gain_is_that_of_an_error_in_the_output(interpolant, prediction):
    for logsnr in (-9.0, -2.0, 0.0, 3.0, 9.0):
        alpha, sigma = pair(interpolant, logsnr, torch.float64)
        z, out = torch.tensor(0.4).double(), torch.tensor(-0.3).double()
        moved = to_x0_eps(prediction, z, out + 1e-3, alpha, sigma, 0.5)
        still = to_x0_eps(prediction, z, out, alpha, sigma, 0.5)
        gain = ((moved[0] - still[0]) / 1e-3).square().log()
        torch.testing.assert_close(gain, log_error_gain(prediction, alpha, sigma, 0.5), rtol=1e-6, atol=1e-6)
        # ‖Δeps‖² = e^logsnr ‖Δx0‖² in every interpolant, because z = αx + σε is fixed
        ratio = ((moved[1] - still[1]) / (moved[0] - still[0])).square().log()
        assert float(ratio) == pytest.approx(logsnr, abs=1e-6)


@EVERY_PREDICTION
def test_x0_alone_is_the_x0_of_both(prediction):
    alpha, sigma = pair("vp", 1.1, torch.float64)
    z, out = torch.randn(2, 50, dtype=torch.float64)
    both = to_x0_eps(prediction, z, out, alpha, sigma, 0.5)[0]
    torch.testing.assert_close(to_x0(prediction, z, out, alpha, sigma, 0.5), both)
