"""The training loss, written once for every schedule, interpolant, prediction and weighting."""

from __future__ import annotations

import math
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffscale.diffusion.interpolants import per_image
from diffscale.diffusion.learned_variance import DiscreteSchedule, bound_terms
from diffscale.diffusion.predictions import from_x0_eps, to_x0
from diffscale.diffusion.process import Diffusion

MULTISCALE_SMALLEST = 32


class LossTerms(NamedTuple):
    """(B,) float32 each. Only `loss` carries a gradient; training needs no more, errors come on demand."""

    loss: Tensor  # weighted, with the terms of a learned uncertainty or variance where there is one
    logsnr: Tensor
    mse: Tensor  # mean squared error of the network's output
    log_gain: Tensor  # ln ‖Δx‖²/‖Δout‖²
    image_gain: float

    def mse_x0(self) -> Tensor:
        """Return the mean squared error of the clean image, in units of images in [−1, 1]."""
        return self.log_gain.exp() * self.mse / self.image_gain**2

    def mse_eps(self) -> Tensor:
        """Return the mean squared error of the noise."""
        return self.logsnr.exp() * (self.log_gain.exp() * self.mse)


def training_loss(
    diffusion: Diffusion,
    model: nn.Module,
    x0: Tensor,
    *,
    u: Tensor,
    noise: Tensor,
    label: Tensor | None = None,
    self_cond_keep: Tensor | None = None,
    **extra: Any,
) -> LossTerms:
    """Loss of each image; the sum over a global batch divided by its size is the objective.

    x0 (B, C, H, W) in [−1, 1]; u (B,) in (0, 1), the schedule's t, so uniform numbers draw the training distribution;
    noise (B, C, H, W) unit normal; label (B,) int64 or None; extra: further keyword arguments of the model.
    A model that carries state (RIN) makes one more pass without gradient on the same z to get it, and
    self_cond_keep (B,) bool says for which samples it is passed on (None: for all).
    """
    t = diffusion.training_time(u)
    logsnr = diffusion.schedule.logsnr(t).float()
    alpha, sigma = diffusion.alpha_sigma(logsnr)
    log_weight, log_gain = diffusion.log_loss_weight(t.float(), logsnr, alpha, sigma)

    x = diffusion.scale_images(x0.float())
    alpha_b, sigma_b = per_image(alpha, x), per_image(sigma, x)
    z = alpha_b * x + sigma_b * noise
    target = from_x0_eps(diffusion.prediction, x, noise, alpha_b, sigma_b, diffusion.scaled_sigma_data)
    norm = diffusion.input_norm(alpha, sigma)
    x_in = z if norm is None else z / per_image(norm, z)

    state = None
    if getattr(model, "carries_state", False):
        with torch.no_grad():
            _, state = model(x_in, logsnr, label, None, **extra)
        if self_cond_keep is not None:
            state = torch.where(per_image(self_cond_keep, state), state, torch.zeros_like(state))
    out, _ = model(x_in, logsnr, label, state, **extra)

    out, share = diffusion.split_output(out.float())
    difference = out - target
    mse = difference.square().flatten(1).mean(1)
    error = multiscale_error(difference) if diffusion.multiscale_loss else mse
    if diffusion.weighting.learned:
        uncertainty = _uncertainty(model, logsnr)
        loss = (log_weight - uncertainty).exp() * error + uncertainty
    else:
        loss = log_weight.exp() * error
    if share is not None:
        estimate = to_x0(diffusion.prediction, z, out.detach(), alpha_b, sigma_b, diffusion.scaled_sigma_data)
        loss = loss + _bound(diffusion, u, share, x0.float(), diffusion.unscale_images(estimate))
    return LossTerms(loss, logsnr, mse.detach(), log_gain, diffusion.image_gain)


def _bound(diffusion: Diffusion, u: Tensor, share: Tensor, image: Tensor, estimate: Tensor) -> Tensor:
    """Return vlb_weight times the bound over all steps, estimated from each image's own step, (B,)."""
    schedule = cast(DiscreteSchedule, diffusion.schedule)
    terms = bound_terms(
        schedule,
        diffusion.training_step(u),
        share,
        image=image,
        estimate=estimate,
        image_gain=diffusion.image_gain,
    )
    return diffusion.vlb_weight * schedule.steps * terms


def _uncertainty(model: nn.Module, logsnr: Tensor) -> Tensor:
    head = getattr(model, "uncertainty", None)
    if head is None:
        raise ValueError("weighting = learned_uncertainty: the model has no `uncertainty` head; edm2 has one")
    return head(logsnr).float()


def multiscale_error(difference: Tensor) -> Tensor:
    """Σ over s in {32, 64, …, d} of (1/s)·mean‖D_s(difference)‖², D_s average pooling to side s (Hoogeboom et al. 2023,
    section 3.3). difference (B, C, d, d) → (B,). A side below 32 has the one scale s = d. Raises ValueError if d is
    not a power of two times 32 above that.
    """
    side = difference.shape[-1]
    halvings = max(0, round(math.log2(side / MULTISCALE_SMALLEST)))
    if side > MULTISCALE_SMALLEST and side != MULTISCALE_SMALLEST * 2**halvings:
        raise ValueError(f"multiscale_loss: resolution {side}: valid are 32 times a power of two, and less than 32")
    total = torch.zeros(len(difference), device=difference.device)
    for _ in range(halvings + 1):
        total = total + difference.square().flatten(1).mean(1) / difference.shape[-1]
        difference = F.avg_pool2d(difference, 2)
    return total
