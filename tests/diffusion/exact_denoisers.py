"""Networks whose denoiser is known exactly, in every prediction and interpolant."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from diffscale.diffusion import Diffusion, create_diffusion, from_x0_eps
from diffscale.diffusion.interpolants import per_image


class GaussianNet(nn.Module):
    """The output of a perfect network for images of independent N(0, std²) values, in [−1, 1] units before scaling."""

    def __init__(self, diffusion: Diffusion, std: float = 0.5) -> None:
        super().__init__()
        self.diffusion, self.std = diffusion, std

    def estimate(self, z: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        variance = (self.std * self.diffusion.image_gain) ** 2
        mean = self.diffusion.image_offset
        return mean + alpha * variance * (z - alpha * mean) / (alpha**2 * variance + sigma**2)

    def forward(self, x_in, logsnr, label=None, state=None):
        alpha, sigma = self.diffusion.alpha_sigma(logsnr)
        norm = self.diffusion.input_norm(alpha, sigma)
        z = x_in if norm is None else x_in * per_image(norm, x_in)
        alpha, sigma = per_image(alpha, z), per_image(sigma, z)
        x0 = self.estimate(z, alpha, sigma)
        eps = (z - alpha * x0) / sigma
        std = self.diffusion.scaled_sigma_data
        return from_x0_eps(self.diffusion.prediction, x0, eps, alpha, sigma, std), None


def gaussian(std: float = 0.5, **settings) -> tuple[Diffusion, GaussianNet]:
    diffusion = create_diffusion(**settings)
    return diffusion, GaussianNet(diffusion, std)


def unit_noise(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)
