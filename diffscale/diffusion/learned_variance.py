"""A learned variance of the reverse step, and the variational bound that trains it (Nichol and Dhariwal 2021).

The reverse step from the noise level λ to the cleaner λ_s adds noise whose variance lies between the posterior's β̃ and
the forward step's β. In y = z / alpha, with ratio = 1 − e^(λ − λ_s),

    β̃ = e^(−λ_s)·ratio,    ln β − ln β̃ = softplus(λ_s) − softplus(λ),

for every interpolant. The network gives each pixel its share v of ln β (eq. 15): ln σ² = v·ln β + (1 − v)·ln β̃.
"""

from __future__ import annotations

import math
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from diffscale.diffusion.interpolants import per_image
from diffscale.diffusion.schedules import Schedule

HALF_BIN = 1 / 255  # half the distance of two grey values of an 8-bit image in [−1, 1]
EDGE = 0.999  # beyond it a value belongs to the first or the last bin, which reach to infinity
SMALLEST_PROBABILITY = 1e-12


class DiscreteSchedule(Schedule, Protocol):
    """A schedule of numbered steps 0 … steps − 1 at t = index / (steps − 1)."""

    @property
    def steps(self) -> int: ...


def levels_at(schedule: DiscreteSchedule, index: Tensor) -> Tensor:
    """Return logsnr (B,) float64 of steps with these numbers (B,) int64."""
    return schedule.logsnr(index.double() / (schedule.steps - 1))


def log_variances(logsnr: Tensor, cleaner: Tensor) -> tuple[Tensor, Tensor]:
    """Return (ln β̃, ln β − ln β̃) in y of the step from `logsnr` to `cleaner`, which is above it."""
    log_small = -cleaner + torch.log(-torch.expm1(logsnr - cleaner))
    return log_small, F.softplus(cleaner) - F.softplus(logsnr)


def gaussian_kl(mean_square: Tensor, log_variance: Tensor, log_variance_of_model: Tensor) -> Tensor:
    """Return KL(N(a, e^log_variance) ‖ N(b, e^log_variance_of_model)) in nats, mean_square = (a − b)²."""
    more = log_variance_of_model - log_variance
    return 0.5 * (more - 1 + torch.exp(-more) + mean_square * torch.exp(-log_variance_of_model))


def discretised_log_likelihood(image: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    """Return ln of the probability that N(mean, std²) gives the bin of an 8-bit value (Ho et al. 2020, eq. 13).

    image: clean values in [−1, 1]; the first and the last bin reach to infinity
    """
    centred, inverse = image - mean, torch.exp(-log_std)
    above = torch.special.ndtr(inverse * (centred + HALF_BIN))
    below = torch.special.ndtr(inverse * (centred - HALF_BIN))
    above = torch.where(image > EDGE, torch.ones_like(above), above)
    below = torch.where(image < -EDGE, torch.zeros_like(below), below)
    return (above - below).clamp(min=SMALLEST_PROBABILITY).log()


def bound_terms(
    schedule: DiscreteSchedule,
    index: Tensor,
    share: Tensor,
    *,
    image: Tensor,
    estimate: Tensor,
    image_gain: float,
) -> Tensor:
    """Return the term of the variational bound at each image's step, in bits for each value of the image, (B,).

    It is KL(q(z_s | z, x) ‖ p(z_s | z)), and at step 0 the discretised negative log-likelihood of the image. The mean
    is not trained by it: `estimate` has no gradient (L_hybrid, Nichol and Dhariwal 2021, section 3.1).

    schedule: its numbered steps
    index: (B,) int64, the step of each image
    share: (B, C, H, W), of ln β in the logarithm of the variance; the network's output, 0 to 1 in the range
    image, estimate: (B, C, H, W), the clean image and the network's x̂, both in units of images in [−1, 1]
    image_gain: what the process multiplies images by before it adds noise
    """
    later = index.clamp(min=1)
    logsnr, cleaner = levels_at(schedule, later), levels_at(schedule, later - 1)
    log_small, gap = log_variances(logsnr, cleaner)
    unit = 2 * math.log(image_gain)  # variances of images instead of x
    mean_factor = torch.expm1(logsnr - cleaner).square()  # means differ by ratio·(x − x̂)

    def like(values: Tensor) -> Tensor:
        return per_image(values.to(image.dtype), image)

    mean_square = like(mean_factor * torch.exp(unit - log_small)) * (image - estimate).square()
    kl = gaussian_kl(mean_square, torch.zeros_like(share), share * like(gap))
    # Step 0 is no posterior: its mean is x̂, and its range goes from β̃ of step 1 to its own β (the authors' code).
    log_small_0 = log_small + F.logsigmoid(cleaner) - unit
    log_large_0 = F.logsigmoid(-cleaner) - unit
    log_variance = torch.lerp(like(log_small_0).expand_as(share), like(log_large_0).expand_as(share), share)
    nll = -discretised_log_likelihood(image, estimate, 0.5 * log_variance)
    terms = torch.where(per_image(index == 0, image), nll, kl)
    return terms.flatten(1).mean(1) / math.log(2)
