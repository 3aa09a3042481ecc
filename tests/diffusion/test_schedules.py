"""logsnr(t): published values, inverses, monotonicity, ends."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from diffscale.diffusion import LOGSNR_LIMIT, SCHEDULES, alpha_bars, cosine_betas, linear_betas, slope

VARIANTS = {
    **{name: build() for name, build in SCHEDULES.items()},
    "cosine_gamma(.2,1,1)": SCHEDULES["cosine_gamma"](0.2, 1, 1),
    "cosine_gamma(0,.5,2)": SCHEDULES["cosine_gamma"](0, 0.5, 2),
    "sigmoid_gamma(0,3,.3)": SCHEDULES["sigmoid_gamma"](0, 3, 0.3),
    "simple_cosine shifted": SCHEDULES["simple_cosine"](noise_resolution=64, resolution=512),
    "simple_cosine interpolated": SCHEDULES["simple_cosine"](
        noise_resolution=256, noise_resolution_low=32, resolution=512
    ),
    "flow_logit_normal JiT": SCHEDULES["flow_logit_normal"](0.8, 0.8, noise_resolution=256, resolution=512),
}
JIT = {"mean": 0.8, "std": 0.8, "noise_resolution": 256}
EVERY = pytest.mark.parametrize("schedule", VARIANTS.values(), ids=VARIANTS.keys())


def gamma_at(schedule, *t):
    return torch.sigmoid(schedule.logsnr(torch.tensor(t, dtype=torch.float64))).tolist()


def test_ddpm_linear_has_the_published_cumulative_product():
    bars = alpha_bars(linear_betas())  # expected: computed with DDPM's code
    assert bars[[0, 499, 999]].tolist() == pytest.approx([0.9999, 0.0785872, 4.03583e-5], rel=2e-6)


def test_iddpm_cosine_has_the_published_cumulative_product():
    bars = alpha_bars(cosine_betas())  # expected: computed with improved DDPM's code
    assert bars[[0, 499, 999]].tolist() == pytest.approx([0.9999587, 0.4938436, 2.4288e-9], rel=2e-5)


@pytest.mark.parametrize(("name", "betas"), [("ddpm_linear", linear_betas), ("iddpm_cosine", cosine_betas)])
def test_discrete_schedules_pass_through_their_steps(name, betas):
    bars = alpha_bars(betas())
    t = torch.arange(1000, dtype=torch.float64) / 999
    torch.testing.assert_close(torch.sigmoid(SCHEDULES[name]().logsnr(t)), bars, rtol=1e-9, atol=0)


@pytest.mark.parametrize(
    ("name", "arguments", "expected"),
    [  # Chen's code (arXiv 2301.10972, algorithm 1) at t = 0.25, 0.5, 0.75
        ("cosine_gamma", (0.2, 1, 1), [0.723607, 0.381966, 0.105573]),
        ("sigmoid_gamma", (-3, 3, 1), [0.850854, 0.5, 0.149146]),
        ("sigmoid_gamma", (0, 3, 0.3), [0.151639, 0.0132961, 0.00101485]),
        ("linear_gamma", (), [0.75, 0.5, 0.25]),
    ],
)
def test_gamma_schedules_have_the_published_values(name, arguments, expected):
    assert gamma_at(SCHEDULES[name](*arguments), 0.25, 0.5, 0.75) == pytest.approx(expected, rel=5e-6)


def test_offset_cosine_is_pix2seqs():
    angle = (0.3 + 0.0002) / (1 + 0.00025) * math.pi / 2  # pix2seq's gamma(t, ns=0.0002, ds=0.00025)
    assert gamma_at(SCHEDULES["offset_cosine_gamma"](), 0.3) == pytest.approx([math.cos(angle) ** 2], rel=1e-12)


@pytest.mark.parametrize(("noise_resolution", "expected"), [(64, -2.7726), (32, -4.1589)])
def test_simple_cosine_is_shifted_by_the_published_amount_at_256(noise_resolution, expected):
    # Hoogeboom et al. 2023 (simple diffusion), section 3.1: 2 ln(noise_d / d) above the plain cosine, which is 0 at 0.5
    schedule = SCHEDULES["simple_cosine"](noise_resolution=noise_resolution, resolution=256)
    assert float(schedule.logsnr(torch.tensor(0.5))) == pytest.approx(expected, abs=5e-5)


def test_interpolated_schedule_has_the_high_noise_resolution_at_the_clean_end():
    build = SCHEDULES["simple_cosine"]
    both = build(noise_resolution=256, noise_resolution_low=32, resolution=512)
    high, low = (build(noise_resolution=n, resolution=512) for n in (256, 32))
    t = torch.tensor([0.0, 0.3, 1.0], dtype=torch.float64)
    torch.testing.assert_close(both.logsnr(t), (1 - t) * high.logsnr(t) + t * low.logsnr(t))


@pytest.mark.parametrize(
    ("name", "arguments", "mean", "std"),
    [  # EDM is N(−2 P_mean, 4 P_std²); JiT at 256 is N(−1.6, 1.6²), at 512 lower by 2 ln 2
        ("edm_lognormal", {}, 2.4, 2.4),
        ("edm_lognormal", {"p_mean": -0.8, "p_std": 1.6}, 1.6, 3.2),
        ("flow_logit_normal", JIT | {"resolution": 256}, -1.6, 1.6),
        (
            "flow_logit_normal",
            JIT | {"resolution": 512},
            -1.6 - 2 * math.log(2),
            1.6,
        ),
    ],
)
def test_uniform_t_draws_the_published_distribution_of_noise_levels(name, arguments, mean, std):
    t = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000
    logsnr = SCHEDULES[name](**arguments).logsnr(t)
    assert stats.kstest(logsnr.numpy(), "norm", args=(mean, std)).statistic < 2e-5


def test_uniform_flow_time_is_the_share_of_noise_of_the_linear_interpolant():
    t = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    torch.testing.assert_close(torch.sigmoid(-SCHEDULES["flow_uniform"]().logsnr(t) / 2), t)


@EVERY
@settings(deadline=None, max_examples=60)
@given(t=st.floats(0, 1))
def test_t_of_logsnr_inverts_logsnr_of_t(schedule, t):
    t = torch.tensor(t, dtype=torch.float64)
    logsnr = schedule.logsnr(t)
    assert math.isfinite(logsnr)
    if abs(logsnr) < LOGSNR_LIMIT:  # beyond it many t share one level
        torch.testing.assert_close(schedule.logsnr(schedule.t(logsnr)), logsnr, rtol=1e-6, atol=1e-6)
        if -float(slope(schedule, t)) < 1e4:
            torch.testing.assert_close(schedule.t(logsnr), t, rtol=0, atol=1e-7)


@EVERY
@settings(deadline=None, max_examples=60)
@given(place=st.floats(0, 1, width=32))
def test_logsnr_of_t_inverts_t_of_logsnr_in_float32(schedule, place):
    most, least = schedule.logsnr(torch.tensor([1.0, 0.0])).tolist()
    logsnr = torch.tensor(most + (least - most) * place)
    t = schedule.t(logsnr)
    assert 0 <= float(t) <= 1
    above, below = (schedule.logsnr(torch.nextafter(t, torch.tensor(end))) for end in (0.0, 1.0))
    assert float(below) - 4e-6 <= float(logsnr) <= float(above) + 4e-6  # the nearest t that float32 has


@EVERY
@settings(deadline=None, max_examples=100)
@given(a=st.floats(0, 1, width=32), b=st.floats(0, 1, width=32))
def test_logsnr_falls_with_t_in_float32_at_both_ends_and_in_between(schedule, a, b):
    first, second = schedule.logsnr(torch.tensor([min(a, b), max(a, b)])).tolist()
    assert first >= second
    limited = abs(first) == LOGSNR_LIMIT or abs(second) == LOGSNR_LIMIT
    if abs(a - b) > 1e-4 and not limited:
        assert first > second


@EVERY
def test_slope_is_the_derivative(schedule):
    t = torch.linspace(0.0213, 0.9787, 40, dtype=torch.float64)
    h = 1e-7
    numeric = (schedule.logsnr(t + h) - schedule.logsnr(t - h)) / (2 * h)
    torch.testing.assert_close(slope(schedule, t), numeric, rtol=1e-5, atol=1e-6)


@EVERY
def test_float32_keeps_its_dtype_and_the_precision_of_float64(schedule):
    t = torch.rand(1000).clamp(0.01, 0.99)
    assert schedule.logsnr(t).dtype == torch.float32
    torch.testing.assert_close(schedule.logsnr(t).double(), schedule.logsnr(t.double()), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("cosine_gamma", {"start": 1.0, "end": 0.5}, "0 <= start < end <= 1"),
        ("sigmoid_gamma", {"tau": 0.0}, "tau > 0"),
        ("offset_cosine_gamma", {"ns": 0.1}, "ns < ds"),
        ("simple_cosine", {"noise_resolution": 64}, "not given"),
        ("simple_cosine", {"noise_resolution_low": 64}, "needs noise_resolution"),
        (
            "simple_cosine",
            {"noise_resolution": 32, "noise_resolution_low": 64, "resolution": 64},
            "1 to noise_res",
        ),
        ("simple_cosine", {"logsnr_min": 3.0, "logsnr_max": 3.0}, "below logsnr_max"),
        ("edm_lognormal", {"p_std": 0.0}, "p_std = 0.0"),
        ("flow_logit_normal", {"std": -1.0}, "std = -1.0"),
        ("ddpm_linear", {"beta_end": 1.0}, "betas above 0 and below 1"),
        ("ddpm_linear", {"steps": 1}, "at least 2 steps"),
    ],
)
def test_settings_out_of_range_are_refused_by_name(name, arguments, message):
    with pytest.raises(ValueError, match=message):
        SCHEDULES[name](**arguments)
