"""Solvers: order on a Gaussian with its exact denoiser, one path for all predictions, grids, clipping, guidance."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from diffscale.diffusion import (
    INTERPOLANTS,
    PREDICTIONS,
    SCHEDULES,
    SOLVERS,
    Guidance,
    create_diffusion,
    from_x0_eps,
    guided_nfe,
    keyed_noise,
    sample,
)
from diffscale.diffusion.interpolants import per_image

from .exact_denoisers import GaussianNet, gaussian, unit_noise

SHAPE = (3, 8, 8)
EDM = {"schedule": {"name": "edm_lognormal"}, "interpolant": "ve", "prediction": "F", "weighting": {"name": "edm"}}


def error_on_a_gaussian(solver, steps: int) -> float:
    """Relative error at sigma 0.05 of the path from sigma 80, for data of standard deviation 0.5, in float64."""
    sigmas = torch.logspace(math.log10(80), math.log10(0.05), steps + 1, dtype=torch.float64).tolist()
    path: list[torch.Tensor] = []

    def denoise(y, sigma):
        path.append(y)
        return y * 0.25 / (0.25 + sigma**2)

    solver.solve(denoise, torch.tensor([80.0], dtype=torch.float64), [*sigmas, 0.0], lambda i: None)
    truth = 80 * math.sqrt((0.05**2 + 0.25) / (80**2 + 0.25))  # dy/dsigma = y·sigma/(sigma² + σ_d²)
    return abs(float(path[-1]) / truth - 1)


@pytest.mark.parametrize(
    ("name", "settings", "order"),
    [
        ("euler", {}, 1),
        ("ddim", {}, 1),
        ("heun", {}, 2),
        ("heun_flow", {}, 2),
        ("dpmpp_2m", {}, 2),
        ("unipc", {"order": 1}, 2),  # the corrector adds one order (Zhao et al. 2023, theorem 3.1)
        ("unipc", {"order": 2}, 3),
        ("unipc", {"order": 2, "variant": "bh1"}, 3),
        ("unipc", {"order": 3}, 3),  # the last step before the clean image is of order 2
    ],
)
def test_solvers_have_their_order_of_convergence(name, settings, order):
    solver = SOLVERS[name](clip="none", **settings)
    coarse, fine = (error_on_a_gaussian(solver, n) for n in (200, 400))
    assert math.log2(coarse / fine) == pytest.approx(order, abs=0.1)


@pytest.mark.parametrize(("steps", "error"), [(18, 0.05527), (32, 0.01570), (64, 0.00366)])
def test_heun_has_the_error_of_edms_sampler_on_a_gaussian(steps, error):
    diffusion, net = gaussian(0.5, **EDM)
    values = []
    solver = SOLVERS["heun"](steps=steps, grid="karras")
    image = sample(diffusion, net, torch.ones(1, 1, 1, 1), solver=solver, callback=lambda e: values.append(e.z))
    assert float(values[0]) == pytest.approx(80)  # σ_d = 0.5, x0 = 80: the exact end is 0.499990
    assert float(image) / 0.499990 - 1 == pytest.approx(error, abs=2e-5)
    assert len(values) == solver.nfe == 2 * steps - 1


@pytest.mark.parametrize("name", SOLVERS)
def test_the_path_is_the_same_for_every_prediction_and_interpolant(name):
    solver = SOLVERS[name](steps=12)
    noise, noise_fn = unit_noise(4, *SHAPE), keyed_noise(0, torch.arange(4), SHAPE)
    paths = []
    for prediction in PREDICTIONS:
        for interpolant in INTERPOLANTS:
            diffusion, net = gaussian(
                0.4, schedule={"name": "ddpm_linear"}, prediction=prediction, interpolant=interpolant
            )
            path: list[torch.Tensor] = []
            image = sample(
                diffusion, net, noise, solver=solver, noise_fn=noise_fn, callback=lambda e, path=path: path.append(e.x)
            )
            paths.append((prediction, torch.stack([*path, image])))
    exact = paths[-1][1]
    for prediction, path in paths:
        # eps begins at logsnr −10, where x0 = (z − sigma·eps)/alpha multiplies rounding by e^5
        tolerance = 5e-4 if prediction == "eps" else 1e-5
        torch.testing.assert_close(path, exact, rtol=0, atol=tolerance)


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_solver_samples_every_schedule(name, schedule):
    diffusion, net = gaussian(0.4, schedule={"name": schedule})
    solver = SOLVERS[name](steps=60, clip="none")
    image = sample(
        diffusion, net, unit_noise(16, *SHAPE), solver=solver, noise_fn=keyed_noise(0, torch.arange(16), SHAPE)
    )
    assert float(image.std()) == pytest.approx(0.4, rel=0.13)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("ddpm", {}),
        ("ddpm", {"variance": "large"}),
        ("ddpm", {"variance": "mix"}),
        ("ddim", {"eta": 0.5}),
        ("ddim", {"eta": 1.0}),
        ("heun", {"s_churn": 40.0, "s_noise": 1.0}),
        ("dpmpp_2m_sde", {}),
        ("dpmpp_2m_sde", {"eta": 0.5}),
    ],
)
def test_stochastic_solvers_reach_the_datas_variance(name, settings):
    diffusion, net = gaussian(0.5, **EDM)
    solver = SOLVERS[name](steps=250, grid="karras", clip="none", **settings)
    image = sample(
        diffusion, net, unit_noise(16, *SHAPE), solver=solver, noise_fn=keyed_noise(0, torch.arange(16), SHAPE)
    )
    assert float(image.std()) == pytest.approx(0.5, rel=0.05)


def test_churn_adds_noise_between_its_limits_alone():
    diffusion, net = gaussian(0.5, **EDM)
    asked: list[int] = []

    def noise_fn(step):
        asked.append(step)
        return unit_noise(1, *SHAPE, seed=step)

    solver = SOLVERS["heun"](steps=18, s_churn=10.0, s_tmin=0.05, s_tmax=50.0)
    levels: list[float] = []
    sample(
        diffusion,
        net,
        unit_noise(1, *SHAPE),
        solver=solver,
        noise_fn=noise_fn,
        callback=lambda e: levels.append(math.exp(-e.logsnr / 2)),
    )
    sigmas = [math.exp(-level / 2) for level in solver.logsnr_grid(diffusion.schedule)]
    assert asked == [i for i, sigma in enumerate(sigmas) if 0.05 <= sigma <= 50]
    first = asked[0]  # EDM, algorithm 2: raised by min(S_churn/N, √2−1)
    assert levels[2 * first] == pytest.approx(sigmas[first] * (1 + min(10 / 18, math.sqrt(2) - 1)))


def test_the_samplers_limits_are_one_another():
    diffusion, net = gaussian(0.4)
    noise, noise_fn = unit_noise(4, *SHAPE), keyed_noise(0, torch.arange(4), SHAPE)

    def images(name, **settings):
        return sample(diffusion, net, noise, solver=SOLVERS[name](steps=10, **settings), noise_fn=noise_fn)

    torch.testing.assert_close(images("ddim"), images("euler"), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(images("ddim", eta=1.0), images("ddpm"), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(images("dpmpp_2m_sde", eta=0.0), images("dpmpp_2m"), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(images("ddpm", variance="mix", variance_mix=1.0), images("ddpm", variance="large"))


def test_eulers_step_on_the_linear_interpolant_is_rectified_flows():
    diffusion, net = gaussian(0.4, interpolant="linear", prediction="u", schedule={"name": "flow_uniform"})
    states: list[torch.Tensor] = []
    sample(
        diffusion,
        net,
        unit_noise(2, *SHAPE),
        solver=SOLVERS["euler"](steps=5, clip="none"),
        callback=lambda e: states.append(e.z),
    )
    t, following = 0.6, 0.4
    velocity = net(states[2], torch.full((2,), 2 * math.log((1 - t) / t)))[0]
    torch.testing.assert_close(states[3], states[2] + (following - t) * velocity, rtol=1e-4, atol=1e-5)


def test_karras_grid_has_the_published_levels():
    solver = SOLVERS["heun"](steps=18, grid="karras")
    sigmas = [math.exp(-x / 2) for x in solver.logsnr_grid(SCHEDULES["edm_lognormal"]())]
    expected = {0: 80, 1: 57.585985, 2: 40.785574, 3: 28.374585, 15: 0.022935, 16: 0.007528, 17: 0.002}
    for i, sigma in expected.items():  # Karras et al. 2022, equation 5
        assert sigmas[i] == pytest.approx(sigma, rel=3e-5)


@pytest.mark.parametrize("steps", [1, 2, 20, 1000])
@pytest.mark.parametrize("grid", ["uniform_t", "uniform_logsnr", "karras", "flow", "offset_cosine"])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_grid_goes_from_noise_to_image_within_the_schedules_range(schedule, grid, steps):
    schedule = SCHEDULES[schedule]()
    levels = torch.tensor(SOLVERS["ddim"](steps=steps, grid=grid).logsnr_grid(schedule))
    most, least = schedule.logsnr(torch.tensor([1.0, 0.0])).tolist()
    assert len(levels) == steps
    assert bool((levels.diff() > 0).all())
    assert most - 1e-4 <= float(levels[0])
    assert float(levels[-1]) <= least + 1e-4


def test_grids_are_evenly_spaced_in_what_they_are_named_for():
    schedule = SCHEDULES["simple_cosine"]()
    levels = {
        grid: torch.tensor(SOLVERS["ddim"](steps=10, grid=grid).logsnr_grid(schedule), dtype=torch.float64)
        for grid in ("uniform_t", "uniform_logsnr", "flow")
    }
    torch.testing.assert_close(schedule.t(levels["uniform_t"]), torch.linspace(1, 0.1, 10).double(), rtol=0, atol=1e-7)
    torch.testing.assert_close(levels["uniform_logsnr"].diff(2), torch.zeros(8).double(), rtol=0, atol=1e-9)
    torch.testing.assert_close(torch.sigmoid(-levels["flow"] / 2).diff(2), torch.zeros(8).double(), rtol=0, atol=1e-9)


def test_static_clipping_limits_the_estimate_at_the_scale_of_the_images():
    for settings, bounds in (({"input_scale": 0.3}, (-0.3, 0.3)), ({"input_range": "0,1"}, (0, 1)), ({}, (-1, 1))):
        diffusion, net = gaussian(3.0, **settings)
        estimates: list[torch.Tensor] = []
        image = sample(
            diffusion,
            net,
            unit_noise(4, *SHAPE),
            solver=SOLVERS["ddim"](steps=6),
            callback=lambda e, seen=estimates: seen.append(e.x),
        )
        seen = torch.stack(estimates)
        assert (float(seen.min()), float(seen.max())) == pytest.approx(bounds)
        assert (float(image.min()), float(image.max())) == pytest.approx((-1, 1))


def test_dynamic_threshold_is_imagens():
    x = 2 * unit_noise(3, *SHAPE)
    x[1] *= 0.1  # within the range: unchanged
    clipped = SOLVERS["ddim"](clip="dynamic", dynamic_percentile=0.9).clip_estimate(x, -1.0, 1.0)
    s = torch.quantile(x[0].abs(), 0.9)
    torch.testing.assert_close(clipped[0], x[0].clamp(-s, s) / s)  # Saharia et al. 2022, section 2.3
    torch.testing.assert_close(clipped[1], x[1])
    shifted = SOLVERS["ddim"](clip="dynamic", dynamic_percentile=0.9).clip_estimate(x / 2 + 0.5, 0.0, 1.0)
    torch.testing.assert_close(shifted, clipped / 2 + 0.5)


class Carrying(nn.Module):
    """Counts its evaluations in its state, and shows the label that it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.states: list[float | None] = []
        self.labels: list[bool] = []

    def forward(self, x_in, logsnr, label=None, state=None):
        self.states.append(None if state is None else float(state.mean()))
        self.labels.append(label is not None)
        return torch.zeros_like(x_in), torch.ones(len(x_in), 1, 1) if state is None else state + 1


@pytest.mark.parametrize(("name", "evaluations"), [("ddim", 5), ("heun", 9), ("unipc", 5), ("dpmpp_2m", 5)])
def test_state_is_carried_from_evaluation_to_evaluation(name, evaluations):
    net = Carrying()
    sample(create_diffusion(), net, unit_noise(2, *SHAPE), solver=SOLVERS[name](steps=5))
    assert net.states == [None, *(float(i) for i in range(1, evaluations))]


def test_guidance_keeps_the_states_of_both_apart():
    net, label, solver = Carrying(), torch.zeros(2, dtype=torch.int64), SOLVERS["ddim"](steps=3)
    sample(create_diffusion(), net, unit_noise(2, *SHAPE), solver=solver, label=label, guidance=Guidance(scale=2.0))
    assert net.states == [None, None, 1, 1, 2, 2]
    assert net.labels == [True, False] * 3


def test_guidance_shares_the_state_of_the_labelled_pass_as_rins_authors_do():
    """google-research/pix2seq, diffusion_utils.py: both passes see the latents that the labelled one left."""
    net, label, solver = Carrying(), torch.zeros(2, dtype=torch.int64), SOLVERS["ddim"](steps=3)
    guidance = Guidance(scale=2.0, state="shared")
    sample(create_diffusion(), net, unit_noise(2, *SHAPE), solver=solver, label=label, guidance=guidance)
    assert net.states == [None, None, 1, 1, 2, 2]
    weaker, main = Carrying(), Carrying()
    guidance = Guidance(scale=2.0, interval=(-100, 0), model=weaker, state="shared")
    sample(create_diffusion(), main, unit_noise(2, *SHAPE), solver=solver, label=label, guidance=guidance)
    assert main.states == [None, 1, 2]
    assert weaker.states == [None, 1][: len(weaker.states)]  # another network has latents of its own


def test_a_shared_state_goes_through_steps_without_guidance():
    label, solver = torch.zeros(2, dtype=torch.int64), SOLVERS["ddim"](steps=4)
    levels: list[float] = []
    interval = None
    for _ in range(2):  # first to see the levels, then with guidance at the last two
        net = Carrying()
        guidance = Guidance(2.0, interval, state="shared") if interval else Guidance()
        sample(
            create_diffusion(),
            net,
            unit_noise(2, *SHAPE),
            solver=solver,
            label=label,
            guidance=guidance,
            callback=lambda e: levels.append(e.logsnr),
        )
        interval = (levels[2], 100.0)
    assert net.states == [None, 1, 2, 2, 3, 3]
    assert net.labels == [True, True, True, False, True, False]


@pytest.mark.parametrize("state", ["shared", "own"])
def test_scale_0_makes_no_pass_whose_estimate_has_no_weight(state):
    net, label, solver = Carrying(), torch.zeros(2, dtype=torch.int64), SOLVERS["ddim"](steps=3)
    guidance = Guidance(scale=0.0, state=state)
    sample(create_diffusion(), net, unit_noise(2, *SHAPE), solver=solver, label=label, guidance=guidance)
    assert net.states == [None, 1, 2]
    assert net.labels == [False] * 3
    assert guided_nfe(create_diffusion(), solver, guidance) == (0, 3)


class Labelled(GaussianNet):
    """Data of one mean for each label, and of mean 0 without one."""

    def forward(self, x_in, logsnr, label=None, state=None):
        mean = torch.zeros(len(x_in)) if label is None else label.float()
        alpha, sigma = (per_image(c, x_in) for c in self.diffusion.alpha_sigma(logsnr))
        mean = per_image(mean, x_in)
        x0 = mean + alpha * self.std**2 * (x_in - alpha * mean) / (alpha**2 * self.std**2 + sigma**2)
        return from_x0_eps(self.diffusion.prediction, x0, (x_in - alpha * x0) / sigma, alpha, sigma, 0.5), None


def guided(guidance, solver="ddim"):
    diffusion = create_diffusion()
    net = Labelled(diffusion, 0.2)
    estimates: list[tuple[float, torch.Tensor]] = []
    image = sample(
        diffusion,
        net,
        unit_noise(2, *SHAPE),
        solver=SOLVERS[solver](steps=8, clip="none"),
        label=torch.tensor([1, 2]),
        guidance=guidance,
        callback=lambda e: estimates.append((e.logsnr, e.x)),
    )
    return image, estimates


def test_scale_1_is_no_guidance_and_0_is_the_guide_alone():
    plain, _ = guided(None)
    assert torch.equal(guided(Guidance(1.0))[0], plain)
    unlabelled, _ = guided(Guidance(0.0))
    assert plain[0].mean() == pytest.approx(1, abs=0.2)
    assert unlabelled[0].mean() == pytest.approx(0, abs=0.2)


def test_guidance_extrapolates_from_the_guide_to_the_model():
    _, first = guided(Guidance(3.0))
    _, model = guided(Guidance(1.0))
    _, guide = guided(Guidance(0.0))
    torch.testing.assert_close(first[0][1], guide[0][1] + 3 * (model[0][1] - guide[0][1]), rtol=1e-4, atol=1e-4)


def test_guidance_of_the_first_channels_leaves_the_others_to_the_label():
    """DiT's code guides three of four latent channels (models.py, forward_with_cfg)."""
    _, first = guided(Guidance(3.0, channels=2))
    _, everywhere = guided(Guidance(3.0))
    _, plain = guided(None)
    assert torch.equal(first[0][1][:, :2], everywhere[0][1][:, :2])
    assert torch.equal(first[0][1][:, 2:], plain[0][1][:, 2:])
    with pytest.raises(ValueError, match="channels"):
        Guidance(3.0, channels=0)


def test_guidance_on_an_interval_leaves_the_rest_alone_and_does_not_pay_for_it():
    guidance = Guidance(3.0, interval=(-3.0, 2.0))
    _, estimates = guided(guidance)
    _, plain = guided(None)
    first_inside = next(i for i, (level, _) in enumerate(estimates) if level >= -3)
    for i in range(first_inside):
        assert torch.equal(estimates[i][1], plain[i][1])
    assert not torch.equal(estimates[first_inside][1], plain[first_inside][1])
    inside = sum(-3 <= level <= 2 for level, _ in estimates)
    solver = SOLVERS["ddim"](steps=8, clip="none")
    assert guided_nfe(create_diffusion(), solver, guidance) == (8, inside)
    assert guided_nfe(create_diffusion(), SOLVERS["heun"](steps=8), Guidance(2.0)) == (15, 15)


def test_autoguidance_asks_the_weaker_model_with_the_same_label():
    diffusion = create_diffusion()
    weaker = Labelled(diffusion, 0.6)
    _, estimates = guided(Guidance(2.0, model=weaker))
    _, model = guided(None)
    _, guide = guided(Guidance(0.0, model=weaker))
    torch.testing.assert_close(estimates[0][1], 2 * model[0][1] - guide[0][1], rtol=1e-4, atol=1e-4)
    assert guide[0][1][1].mean() == pytest.approx(2, abs=0.5)


def test_noise_of_a_step_is_keyed_by_sample():
    positions = torch.tensor([5, 9])
    both = keyed_noise(3, positions, SHAPE)
    assert torch.equal(keyed_noise(3, positions[1:], SHAPE)(4)[0], both(4)[1])
    assert not torch.equal(both(4), both(5))


def test_samples_do_not_depend_on_the_batch_they_are_in():
    diffusion, net = gaussian(0.4)
    noise, solver = unit_noise(4, *SHAPE), SOLVERS["ddpm"](steps=7)
    whole = sample(diffusion, net, noise, solver=solver, noise_fn=keyed_noise(0, torch.arange(4), SHAPE))
    part = sample(diffusion, net, noise[2:3], solver=solver, noise_fn=keyed_noise(0, torch.tensor([2]), SHAPE))
    torch.testing.assert_close(part[0], whole[2])


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("ddim", {"steps": 0}, "solver steps = 0"),
        ("ddim", {"eta": 1.5}, "eta = 1.5"),
        ("ddim", {"grid": "cosine"}, "solver grid = 'cosine'"),
        ("ddim", {"clip": "yes"}, "solver clip = 'yes'"),
        ("ddim", {"sigma_min": 90.0}, "sigma_min = 90.0"),
        ("ddpm", {"variance": "unknown"}, "variance = 'unknown'"),
        ("unipc", {"order": 4}, "order = 4"),
        ("dpmpp_2m_sde", {"eta": -1.0}, "eta = -1.0"),
    ],
)
def test_settings_out_of_range_are_refused_by_name(name, settings, message):
    with pytest.raises(ValueError, match=message):
        SOLVERS[name](**settings)


def test_eps_from_almost_no_signal_is_refused_unless_the_estimate_is_clipped():
    diffusion, net = gaussian(0.4, prediction="eps")
    with pytest.raises(ValueError, match=r"prediction eps at logsnr -15\.0 gives x0 with errors multiplied by 1808"):
        sample(diffusion, net, unit_noise(1, *SHAPE), solver=SOLVERS["ddim"](steps=4, clip="none"))
    sample(diffusion, net, unit_noise(1, *SHAPE), solver=SOLVERS["ddim"](steps=4))
    sample(diffusion, net, unit_noise(1, *SHAPE), solver=SOLVERS["ddim"](steps=4, clip="none", grid="karras"))


def test_a_solver_that_adds_noise_asks_for_it():
    diffusion, net = gaussian(0.4)
    with pytest.raises(ValueError, match="give noise_fn"):
        sample(diffusion, net, unit_noise(1, *SHAPE), solver=SOLVERS["ddpm"](steps=4))


def test_guidance_without_labels_is_refused():
    diffusion, net = gaussian(0.4)
    with pytest.raises(ValueError, match="needs labels"):
        sample(diffusion, net, unit_noise(1, *SHAPE), solver=SOLVERS["ddim"](steps=4), guidance=Guidance(2.0))
    with pytest.raises(ValueError, match="interval"):
        Guidance(2.0, interval=(1.0, 0.0))
