"""Predictions: what the network's output means, and any prediction from any other.

Each is a linear combination out = a·eps + b·x0, with (a, b) depending on the noise level alone. Together with
z = alpha·x0 + sigma·eps that is two equations for two unknowns, so one solution serves them all:

    x0 = (sigma·out − a·z) / (b·sigma − a·alpha),    eps = (b·z − alpha·out) / (b·sigma − a·alpha).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Coefficients = Callable[[Tensor, Tensor, float], tuple[Tensor, Tensor]]


def eps(alpha: Tensor, sigma: Tensor, sigma_data: float) -> tuple[Tensor, Tensor]:
    """The noise (Ho et al. 2020). Its x0 = (z − sigma·eps) / alpha loses all precision as alpha → 0."""
    return torch.ones_like(alpha), torch.zeros_like(alpha)


def x0(alpha: Tensor, sigma: Tensor, sigma_data: float) -> tuple[Tensor, Tensor]:
    """The clean image. Its eps = (z − alpha·x0) / sigma loses all precision as sigma → 0."""
    return torch.zeros_like(alpha), torch.ones_like(alpha)


def v(alpha: Tensor, sigma: Tensor, sigma_data: float) -> tuple[Tensor, Tensor]:
    """v = alpha·eps − sigma·x0 (Salimans and Ho 2022)."""
    return alpha, -sigma


def u(alpha: Tensor, sigma: Tensor, sigma_data: float) -> tuple[Tensor, Tensor]:
    """The flow's velocity eps − x0 (Liu et al. 2023), towards noise."""
    return torch.ones_like(alpha), -torch.ones_like(alpha)


def F(alpha: Tensor, sigma: Tensor, sigma_data: float) -> tuple[Tensor, Tensor]:
    """EDM's F_θ in D = c_skip·y + c_out·F (Karras et al. 2022, eq. 7), y = z / alpha with noise s = sigma / alpha.

    F = (x0 − c_skip·y) / c_out has the coefficients −σ_d/√(s²+σ_d²) on eps and s/(σ_d·√(s²+σ_d²)) on x0. At σ_d = 1 it
    is −v of the variance-preserving interpolant.
    """
    norm = (sigma.square() + (sigma_data * alpha).square()).sqrt()
    return -sigma_data * alpha / norm, sigma / (sigma_data * norm)


PREDICTIONS: dict[str, Coefficients] = {"eps": eps, "x0": x0, "v": v, "u": u, "F": F}


def to_x0_eps(
    prediction: str, z: Tensor, out: Tensor, alpha: Tensor, sigma: Tensor, sigma_data: float
) -> tuple[Tensor, Tensor]:
    """(x0, eps) that `out`, a prediction of that name at z, stands for. alpha, sigma broadcast against z."""
    a, b = PREDICTIONS[prediction](alpha, sigma, sigma_data)
    determinant = b * sigma - a * alpha
    return (sigma * out - a * z) / determinant, (b * z - alpha * out) / determinant


def to_x0(prediction: str, z: Tensor, out: Tensor, alpha: Tensor, sigma: Tensor, sigma_data: float) -> Tensor:
    """The x0 of `to_x0_eps` alone."""
    a, b = PREDICTIONS[prediction](alpha, sigma, sigma_data)
    determinant = b * sigma - a * alpha
    return (sigma / determinant) * out - (a / determinant) * z


def from_x0_eps(prediction: str, x0: Tensor, eps: Tensor, alpha: Tensor, sigma: Tensor, sigma_data: float) -> Tensor:
    """The prediction of that name that (x0, eps) make. alpha, sigma broadcast against x0."""
    a, b = PREDICTIONS[prediction](alpha, sigma, sigma_data)
    return a * eps + b * x0


def convert(
    source: str, target: str, z: Tensor, out: Tensor, alpha: Tensor, sigma: Tensor, sigma_data: float = 0.5
) -> Tensor:
    """`out`, a prediction named `source` at z, as the prediction named `target`. alpha, sigma broadcast against z."""
    return from_x0_eps(target, *to_x0_eps(source, z, out, alpha, sigma, sigma_data), alpha, sigma, sigma_data)


def log_error_gain(prediction: str, alpha: Tensor, sigma: Tensor, sigma_data: float) -> Tensor:
    """ln of ‖Δx0‖² / ‖Δout‖² at fixed z: how an error of the network becomes an error of the image."""
    a, b = PREDICTIONS[prediction](alpha, sigma, sigma_data)
    return 2 * (sigma.log() - (b * sigma - a * alpha).abs().log())
