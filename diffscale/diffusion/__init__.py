"""Diffusion as pure functions of tensors: any schedule × interpolant × prediction × weighting × solver.

Needs torch and numpy alone. `create_diffusion` makes a process, `training_loss` trains a network on it, `denoise` is
its denoiser D(z, logsnr), `sample` draws images with `SOLVERS[name](...)`.
"""

from diffscale.diffusion.beta_schedules import alpha_bars, cosine_betas, linear_betas
from diffscale.diffusion.denoiser import CapturedDenoiser, Guidance, denoise
from diffscale.diffusion.forward_process import add_noise, measured_logsnr, mix, q_sample, q_sample_step
from diffscale.diffusion.interpolants import INTERPOLANTS
from diffscale.diffusion.loss import LossTerms, multiscale_error, training_loss
from diffscale.diffusion.predictions import PREDICTIONS, convert, from_x0_eps, to_x0_eps
from diffscale.diffusion.process import SCHEDULES, Diffusion, create_diffusion, loss_concentration
from diffscale.diffusion.sampling import SOLVERS, Evaluation, check_sampler, guided_nfe, keyed_noise, sample
from diffscale.diffusion.schedules import LOGSNR_LIMIT, Schedule, slope
from diffscale.diffusion.weightings import WEIGHTINGS

__all__ = [
    "INTERPOLANTS",
    "LOGSNR_LIMIT",
    "PREDICTIONS",
    "SCHEDULES",
    "SOLVERS",
    "WEIGHTINGS",
    "CapturedDenoiser",
    "Diffusion",
    "Evaluation",
    "Guidance",
    "LossTerms",
    "Schedule",
    "add_noise",
    "alpha_bars",
    "check_sampler",
    "convert",
    "cosine_betas",
    "create_diffusion",
    "denoise",
    "from_x0_eps",
    "guided_nfe",
    "keyed_noise",
    "linear_betas",
    "loss_concentration",
    "measured_logsnr",
    "mix",
    "multiscale_error",
    "q_sample",
    "q_sample_step",
    "sample",
    "slope",
    "to_x0_eps",
    "training_loss",
]
