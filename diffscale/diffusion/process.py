"""One diffusion process: schedule, interpolant, prediction, weighting and input scaling, chosen independently."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diffscale.diffusion.beta_schedules import DDPMLinear, IDDPMCosine
from diffscale.diffusion.distributions import EDMLogNormal, FlowLogitNormal, FlowUniform
from diffscale.diffusion.interpolants import INTERPOLANTS
from diffscale.diffusion.preconditioning import InputRange, InputStd, Preconditioning, Variance
from diffscale.diffusion.predictions import PREDICTIONS, from_x0_eps, log_error_gain
from diffscale.diffusion.schedules import (
    CosineGamma,
    LinearGamma,
    OffsetCosineGamma,
    Schedule,
    SigmoidGamma,
    SimpleCosine,
    slope,
)
from diffscale.diffusion.weightings import WEIGHTINGS, MinSNR, Weighting

SCHEDULES: dict[str, type] = {
    "ddpm_linear": DDPMLinear,
    "iddpm_cosine": IDDPMCosine,
    "linear_gamma": LinearGamma,
    "cosine_gamma": CosineGamma,
    "sigmoid_gamma": SigmoidGamma,
    "offset_cosine_gamma": OffsetCosineGamma,
    "simple_cosine": SimpleCosine,
    "edm_lognormal": EDMLogNormal,
    "flow_uniform": FlowUniform,
    "flow_logit_normal": FlowLogitNormal,
}


@dataclass(frozen=True, kw_only=True)
class Diffusion(Preconditioning):
    """A preconditioning with a schedule of noise levels and the weights that the loss gives them.

    Make it with `create_diffusion`, which refuses singular combinations.
    """

    schedule: Schedule
    weighting: Weighting = MinSNR()  # noqa: RUF009 (frozen)
    multiscale_loss: bool = False
    discrete: bool = False  # noise levels are those of the schedule's own steps
    vlb_weight: float = 0.001  # of the variational bound in the loss, with a learned variance

    def training_step(self, u: Tensor) -> Tensor:
        """Number of the schedule's step that uniform u (B,) in [0, 1) draws: (B,) int64. For discrete processes."""
        steps = self.schedule.steps  # type: ignore[attr-defined]
        return (u.double() * steps).long().clamp(max=steps - 1)

    def training_time(self, u: Tensor) -> Tensor:
        """The schedule's t that uniform u (B,) in [0, 1) draws: u itself, or that of the schedule's own steps."""
        if not self.discrete:
            return u.float()
        return self.training_step(u).double() / (self.schedule.steps - 1)  # type: ignore[attr-defined]

    def log_loss_weight(self, t: Tensor, logsnr: Tensor, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """(ln weight on the squared error of the output, ln ‖Δx‖²/‖Δout‖²), both of t's shape, float32."""
        gain = log_error_gain(self.prediction, alpha, sigma, self.scaled_sigma_data)
        weight = self.weighting.log_weight(logsnr, self.scaled_sigma_data) + logsnr + gain
        if self.weighting.per_logsnr:
            weight = weight + (-0.5 * slope(self.schedule, t)).log()
        return weight, gain


def create_diffusion(
    *,
    schedule: Mapping[str, Any] | Schedule = SimpleCosine(),  # noqa: B008 (frozen)
    interpolant: str = "vp",
    prediction: str = "v",
    weighting: Mapping[str, Any] | Weighting = MinSNR(),  # noqa: B008 (frozen)
    input_scale: float = 1.0,
    sigma_data: float = 0.5,
    input_range: InputRange = "-1,1",
    input_std: InputStd = "auto",
    multiscale_loss: bool = False,
    discrete: bool = False,
    variance: Variance = "fixed",
    vlb_weight: float = 0.001,
    resolution: int | None = None,
) -> Diffusion:
    """The process of these settings, checked.

    schedule, weighting: an object, or {"name": one of SCHEDULES / WEIGHTINGS, **its parameters}.
    input_scale: Chen's b > 0, images are multiplied by it. It moves logsnr by 2 ln b, as a shift of the schedule does:
    never use both for the same purpose. sigma_data: standard deviation of images in [−1, 1].
    discrete: training draws the schedule's own steps (ddpm_linear, iddpm_cosine) instead of levels between them.
    variance: learned_range reads twice the channels, and adds vlb_weight times the bound over all steps, in bits for
    each value, to the loss (L_hybrid, Nichol and Dhariwal 2021). It needs `discrete`.
    resolution: side of the images, for schedules that are shifted by it.

    Raises ValueError for an unknown name, a value out of range, and a combination in which a few noise levels would
    hold nearly all of the loss because the weight is singular in the space of the output.
    """
    for setting, value, valid in (
        ("interpolant", interpolant, INTERPOLANTS),
        ("prediction", prediction, PREDICTIONS),
        ("input_range", input_range, ("-1,1", "0,1")),
        ("input_std", input_std, ("auto", "unit", "data", "image", "none")),
        ("variance", variance, ("fixed", "learned_range")),
    ):
        if value not in valid:
            raise ValueError(f"{setting} = {value!r}: valid are {', '.join(valid)}")
    for setting, number in (("input_scale", input_scale), ("sigma_data", sigma_data)):
        if not (math.isfinite(number) and number > 0):
            raise ValueError(f"{setting} = {number}: above 0")
    if prediction == "F" and input_std not in ("auto", "data"):
        raise ValueError(f"input_std = {input_std!r}: prediction F brings its own c_in; valid are auto, data")
    if not (math.isfinite(vlb_weight) and vlb_weight >= 0):
        raise ValueError(f"vlb_weight = {vlb_weight}: 0 or more")
    if variance == "learned_range" and not discrete:
        raise ValueError("variance = learned_range: the bound is over the schedule's own steps: set discrete = true")
    diffusion = Diffusion(
        schedule=_create("schedule", SCHEDULES, schedule, resolution),
        interpolant=interpolant,
        prediction=prediction,
        weighting=_create("weighting", WEIGHTINGS, weighting, resolution),
        input_scale=input_scale,
        sigma_data=sigma_data,
        input_range=input_range,
        input_std=input_std,
        multiscale_loss=multiscale_loss,
        discrete=discrete,
        variance=variance,
        vlb_weight=vlb_weight,
    )
    _refuse_overflow(diffusion)
    if discrete and not hasattr(diffusion.schedule, "steps"):
        names = ", ".join(name for name, kind in SCHEDULES.items() if "steps" in inspect.signature(kind).parameters)
        raise ValueError(f"discrete = true: this schedule has no numbered steps; {names} have them")
    _refuse_singular(diffusion)
    return diffusion


def _create(setting: str, classes: Mapping[str, type], given: Mapping[str, Any] | Any, resolution: int | None) -> Any:
    if not isinstance(given, Mapping):
        return given
    arguments = dict(given)
    name = arguments.pop("name", None)
    if name not in classes:
        raise ValueError(f"{setting}.name = {name!r}: valid are {', '.join(classes)}")
    parameters = inspect.signature(classes[name]).parameters
    if unknown := set(arguments) - set(parameters):
        raise ValueError(f"{setting} {name}: unknown {sorted(unknown)}: valid are {', '.join(parameters)}")
    if "resolution" in parameters:
        arguments.setdefault("resolution", resolution)
    return classes[name](**arguments)


def loss_concentration(diffusion: Diffusion, levels: int = 4096, share: float = 0.01) -> float:
    """Share of the whole weight (on the output's squared error) that the heaviest `share` of training's levels hold."""
    t = (torch.arange(levels, dtype=torch.float64) + 0.5) / levels
    logsnr = diffusion.schedule.logsnr(t)
    alpha, sigma = diffusion.alpha_sigma(logsnr)
    weight = diffusion.log_loss_weight(t, logsnr, alpha, sigma)[0]
    weight = (weight - weight.max()).exp().sort(descending=True).values
    return float(weight[: round(levels * share)].sum() / weight.sum())


def _refuse_overflow(diffusion: Diffusion, levels: int = 256, end: float = 1e-6, limit: float = 1e15) -> None:
    """Raise ValueError unless logsnr falls with t and the loss of a zero output is one that float32 can square."""
    t = torch.linspace(end, 1 - end, levels, dtype=torch.float64).float()
    try:
        logsnr = diffusion.schedule.logsnr(t)
        alpha, sigma = diffusion.alpha_sigma(logsnr)
        one = torch.full_like(t, diffusion.image_gain)
        target = from_x0_eps(diffusion.prediction, one, -torch.ones_like(t), alpha, sigma, diffusion.scaled_sigma_data)
        weight = diffusion.log_loss_weight(t, logsnr, alpha, sigma)[0]
        norm = diffusion.input_norm(alpha, sigma)
    except ArithmeticError as error:
        raise ValueError(f"schedule = {diffusion.schedule}: {error}") from None
    noisy = (alpha * diffusion.image_gain).square() + sigma.square()
    loss = weight.exp() * target.square()
    worst = max(float(torch.nan_to_num(v, nan=math.inf).max()) for v in (noisy, loss))
    falls = bool((logsnr.diff() <= 0).all()) and float(logsnr[0]) > float(logsnr[-1])
    if not falls or not worst < limit or (norm is not None and not bool((norm > 0).all())):
        ends = f"{float(logsnr[0]):.4g} to {float(logsnr[-1]):.4g}"
        raise ValueError(
            f"schedule = {diffusion.schedule}, input_scale = {diffusion.input_scale}: logsnr from {ends} gives noisy "
            f"images or losses up to {worst:.3g}; valid are a logsnr that falls and values below {limit:g}"
        )


def _refuse_singular(diffusion: Diffusion, limit: float = 0.4) -> None:
    held = loss_concentration(diffusion)
    if not held <= limit:
        weighting = next((n for n, c in WEIGHTINGS.items() if c is type(diffusion.weighting)), diffusion.weighting)
        raise ValueError(
            f"weighting = {weighting}: with prediction {diffusion.prediction} on this schedule, 1 % of the noise "
            f"levels would hold {held:.0%} of the loss (at most {limit:.0%}): the weight is singular in the space of "
            f"the output. Use prediction v, a weighting bounded in {diffusion.prediction} such as min_snr, or a "
            "schedule with a smaller range of logsnr"
        )
