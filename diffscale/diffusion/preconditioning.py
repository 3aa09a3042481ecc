"""What a network is given and what its output means: EDM's preconditioning, and that of every other convention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from diffscale.diffusion.interpolants import INTERPOLANTS

InputStd = Literal["auto", "unit", "data", "image", "none"]
InputRange = Literal["-1,1", "0,1"]
Variance = Literal["fixed", "learned_range"]


@dataclass(frozen=True, kw_only=True)
class Preconditioning:
    """z = alpha(logsnr)·x + sigma(logsnr)·eps with x = image_gain·image + image_offset, image in [−1, 1].

    It is all that a sampler needs of a process besides the noise levels.
    """

    interpolant: str = "vp"
    prediction: str = "v"
    input_scale: float = 1.0
    sigma_data: float = 0.5
    input_range: InputRange = "-1,1"
    input_std: InputStd = "auto"
    variance: Variance = "fixed"  # learned_range: the network's second half of channels (diffusion/learned_variance.py)

    @property
    def image_gain(self) -> float:
        return self.input_scale * (0.5 if self.input_range == "0,1" else 1.0)

    @property
    def image_offset(self) -> float:
        return self.input_scale * 0.5 if self.input_range == "0,1" else 0.0

    @property
    def scaled_sigma_data(self) -> float:
        """Standard deviation of x: what EDM's preconditioning and weighting use."""
        return self.sigma_data * self.image_gain

    def scale_images(self, images: Tensor) -> Tensor:
        """Images in [−1, 1] to x, the clean images that noise is added to."""
        return images * self.image_gain + self.image_offset

    def unscale_images(self, x: Tensor) -> Tensor:
        """x back to images in [−1, 1]."""
        return (x - self.image_offset) / self.image_gain

    def clip_bounds(self) -> tuple[float, float]:
        """The range of x."""
        return self.image_offset - self.image_gain, self.image_offset + self.image_gain

    @property
    def learns_variance(self) -> bool:
        return self.variance == "learned_range"

    def split_output(self, out: Tensor) -> tuple[Tensor, Tensor | None]:
        """The network's output as (prediction, share of ln β in the learned variance or None).

        The share is (v + 1)/2 of the channels v, so v in [−1, 1] is the range (Dhariwal and Nichol 2021's code).
        """
        if not self.learns_variance:
            return out, None
        prediction, v = out.chunk(2, dim=1)
        return prediction, (v.float() + 1) / 2

    def alpha_sigma(self, logsnr: Tensor) -> tuple[Tensor, Tensor]:
        return INTERPOLANTS[self.interpolant](logsnr)

    def input_norm(self, alpha: Tensor, sigma: Tensor) -> Tensor | None:
        """What z is divided by before it enters the network; None is 1.

        unit: √(alpha²·b² + sigma²), the standard deviation of z for unit-variance data (Chen 2023), b = image_gain.
        data: the same with the data's own sigma_data·b, which times 1/alpha is EDM's c_in; always so for F.
        image: b, so that the network sees the images' own scale and noise of 1/b (JiT's noise scale).
        auto: data for F; none for vp and linear at b = 1, as published models have it; unit elsewhere.
        """
        kind = self.input_std
        if kind == "auto":
            plain = self.image_gain == 1 and self.interpolant != "ve"
            kind = "data" if self.prediction == "F" else "none" if plain else "unit"
        if kind == "none":
            return None
        if kind == "image":
            return torch.full_like(sigma, self.image_gain)
        std = self.scaled_sigma_data if kind == "data" else self.image_gain
        return (sigma.square() + (alpha * std).square()).sqrt()
