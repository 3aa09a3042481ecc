"""The denoiser D(z, logsnr) of any trained network, and guidance of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from diffscale.diffusion.interpolants import per_image
from diffscale.diffusion.predictions import to_x0
from diffscale.diffusion.process import Diffusion


def denoise(
    diffusion: Diffusion,
    model: nn.Module,
    z: Tensor,
    logsnr: Tensor,
    label: Tensor | None = None,
    state: Tensor | None = None,
    **extra: Any,
) -> tuple[Tensor, Tensor | None]:
    """(x̂, state): the network's estimate of the clean x at noise level logsnr, unclipped, and the state it carries on.

    z (B, C, H, W) = alpha·x + sigma·eps at the scale of `diffusion.scale_images`, as is x̂ (float32); logsnr (B,);
    label (B,) int64 or None; extra: further keyword arguments of the model.
    """
    logsnr = logsnr.float()
    alpha, sigma = diffusion.alpha_sigma(logsnr)
    norm = diffusion.input_norm(alpha, sigma)
    x_in = z if norm is None else z / per_image(norm, z)
    out, state = model(x_in, logsnr, label, state, **extra)
    alpha_b, sigma_b = per_image(alpha, z), per_image(sigma, z)
    return to_x0(diffusion.prediction, z, out.float(), alpha_b, sigma_b, diffusion.scaled_sigma_data), state


@dataclass(frozen=True)
class Guidance:
    """x̂ = x̂_guide + scale·(x̂ − x̂_guide): 1 is no guidance.

    The guide is the model without its label (classifier-free, Ho and Salimans 2022), or `model`, a weaker network of
    the same process and with the same label (autoguidance, Karras et al. 2024, "Guiding a Diffusion Model with a Bad
    Version of Itself"). It is used for logsnr within `interval`, ends included (Kynkäänniemi et al. 2024), and not
    evaluated outside.
    """

    scale: float = 1.0
    interval: tuple[float, float] | None = None  # (lowest, highest) logsnr; None is everywhere
    model: nn.Module | None = None  # autoguidance

    def __post_init__(self) -> None:
        if self.interval is not None and not self.interval[0] < self.interval[1]:
            raise ValueError(f"guidance interval = {self.interval}: (lowest, highest) logsnr")

    def active(self, logsnr: float) -> bool:
        inside = self.interval is None or self.interval[0] <= logsnr <= self.interval[1]
        return self.scale != 1 and inside


class GuidedDenoiser:
    """`denoise` with guidance for the steps of one sampling run; it keeps the networks' states between its calls."""

    def __init__(
        self, diffusion: Diffusion, model: nn.Module, label: Tensor | None, guidance: Guidance, extra: dict[str, Any]
    ) -> None:
        if guidance.scale != 1 and guidance.model is None and label is None:
            raise ValueError(f"guidance scale = {guidance.scale}: classifier-free guidance needs labels")
        self.diffusion, self.model, self.label, self.guidance = diffusion, model, label, guidance
        self.extra = extra
        self.state: Tensor | None = None
        self.guide_state: Tensor | None = None

    def __call__(self, z: Tensor, logsnr: float) -> Tensor:
        """z (B, C, H, W) → x̂ (B, C, H, W)."""
        levels = torch.full((len(z),), logsnr, dtype=torch.float32, device=z.device)
        x, self.state = denoise(self.diffusion, self.model, z, levels, self.label, self.state, **self.extra)
        if not self.guidance.active(logsnr):
            return x
        guide, label = self.guidance.model, self.label
        if guide is None:
            guide, label = self.model, None
        other, self.guide_state = denoise(self.diffusion, guide, z, levels, label, self.guide_state, **self.extra)
        return torch.lerp(other, x, self.guidance.scale)
