"""Each architecture can memorise 64 images: the error of the denoised image falls far below what it starts at."""

from __future__ import annotations

import pytest
import torch

from diffscale.diffusion import create_diffusion, training_loss
from diffscale.models import MODELS, create_model

# EDM2's weights have unit norm: published rates are about ten times larger. UViT's projections start at zero.
LR = {"edm2": 1e-2, "uvit": 3e-3}
SIDE = {"dit": {"patch_size": 2}, "jit": {"patch_size": 2}, "rin": {"patch_size": 2}}


def images() -> torch.Tensor:
    """64 images (64, 3, 8, 8) in [−1, 1]: a coloured disc on a coloured ground, each at another place."""
    generator = torch.Generator().manual_seed(0)
    centre, ground, disc = (torch.rand(64, n, 1, 1, generator=generator) * 2 - 1 for n in (2, 3, 3))
    axis = torch.linspace(-1, 1, 8)
    inside = (axis[None, :, None] - centre[:, 0]) ** 2 + (axis[None, None, :] - centre[:, 1]) ** 2 < 0.2
    return torch.where(inside[:, None], disc, ground)


@pytest.mark.slow
@pytest.mark.parametrize("name", [pytest.param(m, marks=pytest.mark.gate if m == "dit" else ()) for m in MODELS])
def test_64_images_are_memorised(name):
    torch.manual_seed(0)
    model, x0 = create_model(f"{name}-tiny", **({"resolution": 8} | SIDE.get(name, {}))), images()
    diffusion = create_diffusion(prediction="v", resolution=8)
    lr = LR.get(name, 1e-3)
    optimizer = torch.optim.Adam(model.parameters(), lr, betas=(0.9, 0.99))
    generator = torch.Generator().manual_seed(1)

    model.train()
    history = []
    for step in range(200):
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1.0, (step + 1) / 20) * (1 - step / 200)
        optimizer.zero_grad(set_to_none=True)
        u = 0.4 + 0.2 * torch.rand(64, generator=generator)  # noise that hides detail, but not which image it is
        noise = torch.randn(x0.shape, generator=generator)
        keep = torch.rand(64, generator=generator) < 0.9
        terms = training_loss(diffusion, model, x0, u=u, noise=noise, self_cond_keep=keep)
        terms.loss.mean().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        history.append(terms.mse_x0().mean().item())
    assert sum(history[-10:]) / 10 < 0.25 * sum(history[:3]) / 3, (history[:3], history[-10:])
