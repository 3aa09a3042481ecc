"""diffusers' schedulers as an independent second opinion: the same state at every step, for the same network output."""

from __future__ import annotations

import math

import diffusers
import pytest
import torch

from diffscale.diffusion import SOLVERS, alpha_bars, cosine_betas, linear_betas

from .exact_denoisers import unit_noise

STEPS = 12
START = unit_noise(2, 3, 4, 4, dtype=torch.float64)
BETAS = {
    "num_train_timesteps": 1000,
    "beta_schedule": "linear",
    "beta_start": 1e-4,
    "beta_end": 0.02,
}


def network(z: torch.Tensor) -> torch.Tensor:
    """The eps of a made-up network: smooth, not linear, the same for both sides. z is variance preserving."""
    return 0.9 * torch.tanh(z) + 0.2 * torch.sin(3 * z)


def step_noise(i: int) -> torch.Tensor:
    return unit_noise(*START.shape, seed=100 + i, dtype=torch.float64)


def ours(solver, alpha_bars_of_steps: list[float], begin: torch.Tensor = START) -> list[torch.Tensor]:
    """Variance-preserving states at which the network is evaluated, and the last image."""
    sigmas = [math.sqrt((1 - bar) / bar) for bar in alpha_bars_of_steps] + [0.0]
    states = []

    def denoise(y, sigma):
        z = y / math.sqrt(1 + sigma**2)
        states.append(z)
        return solver.clip_estimate(y - sigma * network(z), -1.0, 1.0)

    image = solver.solve(denoise, begin * math.sqrt(1 + sigmas[0] ** 2), sigmas, step_noise)
    return [*states, image]


def theirs(scheduler, **step_arguments) -> list[torch.Tensor]:
    """The same of a diffusers scheduler that works on variance-preserving states."""
    z, states = START, [START]
    for i, t in enumerate(scheduler.timesteps):
        keyed = {"variance_noise": step_noise(i)} if step_arguments.get("variance_noise") else {}
        rest = {k: v for k, v in step_arguments.items() if k != "variance_noise"}
        z = scheduler.step(network(z), t, z, **rest, **keyed).prev_sample
        states.append(z)
    return states


def check(mine: list[torch.Tensor], other: list[torch.Tensor], tolerance: float) -> None:
    assert len(mine) == len(other)
    for a, b in zip(mine, other, strict=True):
        torch.testing.assert_close(a, b.double(), rtol=tolerance, atol=tolerance)


def bars(scheduler) -> list[float]:
    return scheduler.alphas_cumprod.double()[scheduler.timesteps.long()].tolist()


@pytest.mark.parametrize(("schedule", "betas"), [("linear", linear_betas), ("squaredcos_cap_v2", cosine_betas)])
def test_betas_are_diffusers(schedule, betas):
    scheduler = diffusers.DDPMScheduler(**(BETAS | {"beta_schedule": schedule}))
    torch.testing.assert_close(alpha_bars(betas()), scheduler.alphas_cumprod.double(), rtol=2e-4, atol=1e-9)


@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("variance", ["small", "large"])
def test_ddpm(variance, clip, monkeypatch):
    scheduler = diffusers.DDPMScheduler(**BETAS, variance_type=f"fixed_{variance}", clip_sample=clip)
    scheduler.set_timesteps(STEPS)
    drawn = iter(range(STEPS))
    module = diffusers.schedulers.scheduling_ddpm
    monkeypatch.setattr(module, "randn_tensor", lambda *arguments, **rest: step_noise(next(drawn)))
    solver = SOLVERS["ddpm"](steps=STEPS, variance=variance, clip="static" if clip else "none")
    check(ours(solver, bars(scheduler)), theirs(scheduler), 1e-4)


@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("eta", [0.0, 0.6, 1.0])
def test_ddim(eta, clip):
    scheduler = diffusers.DDIMScheduler(**BETAS, clip_sample=clip, set_alpha_to_one=True)
    scheduler.set_timesteps(STEPS)
    solver = SOLVERS["ddim"](steps=STEPS, eta=eta, clip="static" if clip else "none")
    other = theirs(scheduler, eta=eta, use_clipped_model_output=True, variance_noise=eta > 0)
    # theirs adds noise of eta in the last step too, where ours gives the estimated clean image
    mine = ours(solver, bars(scheduler))
    check(mine[:-1], other[:-1], 1e-4)
    if eta == 0:
        check(mine, other, 1e-4)


@pytest.mark.parametrize("algorithm", ["dpmsolver++", "sde-dpmsolver++"])
def test_dpmpp_2m(algorithm):
    scheduler = diffusers.DPMSolverMultistepScheduler(
        **BETAS, algorithm_type=algorithm, solver_order=2, solver_type="midpoint", final_sigmas_type="zero"
    )
    scheduler.set_timesteps(STEPS)
    stochastic = algorithm.startswith("sde")
    solver = SOLVERS["dpmpp_2m_sde" if stochastic else "dpmpp_2m"](steps=STEPS, clip="none")
    check(ours(solver, bars(scheduler)), theirs(scheduler, variance_noise=stochastic), 1e-4)


@pytest.mark.parametrize("variant", ["bh1", "bh2"])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_unipc(order, variant):
    scheduler = diffusers.UniPCMultistepScheduler(
        **BETAS, solver_order=order, solver_type=variant, final_sigmas_type="zero"
    )
    scheduler.set_timesteps(STEPS)
    solver = SOLVERS["unipc"](steps=STEPS, order=order, variant=variant, clip="none")
    mine, other = ours(solver, bars(scheduler)), theirs(scheduler)
    if variant == "bh1":  # diffusers' bh1 multiplies ∞ by 0 in the step to the clean image
        assert bool(other[-1].isnan().all())
        mine, other = mine[:-1], other[:-1]
    check(mine, other, 1e-4)


@pytest.mark.parametrize(
    ("name", "scheduler_class"), [("euler", "EulerDiscreteScheduler"), ("heun", "HeunDiscreteScheduler")]
)
def test_euler_and_heun(name, scheduler_class):
    scheduler = getattr(diffusers, scheduler_class)(**BETAS)
    scheduler.set_timesteps(STEPS)
    y = START * float(scheduler.sigmas[0])
    states = [y]
    for t in scheduler.timesteps:
        z = scheduler.scale_model_input(y, t)
        y = scheduler.step(network(z), t, y).prev_sample
        states.append(y)
    sigmas = list(dict.fromkeys(scheduler.sigmas.tolist()))
    seen = []

    def denoise(y, sigma):
        seen.append(y)
        return y - sigma * network(y / math.sqrt(1 + sigma**2))

    solver = SOLVERS[name](steps=STEPS, clip="none")
    image = solver.solve(denoise, START * sigmas[0], sigmas, step_noise)
    check([*seen, image], states, 1e-4)


def test_euler_on_rectified_flow():
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(STEPS)
    z, states = START, [START]
    for t in scheduler.timesteps:
        z = scheduler.step(network(z), t, z).prev_sample  # here the network gives eps − x0
        states.append(z)
    amounts = scheduler.sigmas.double().tolist()
    amounts[0] = 1 - 1e-7  # pure noise has sigma/alpha = ∞
    seen = []

    def denoise(y, sigma):
        amount = sigma / (1 + sigma)
        z = y * (1 - amount)
        seen.append(z)
        return z - amount * network(z)

    sigmas = [a / (1 - a) for a in amounts]
    image = SOLVERS["euler"](steps=STEPS, clip="none").solve(denoise, START / (1 - amounts[0]), sigmas, step_noise)
    check([*seen, image], states, 1e-4)
