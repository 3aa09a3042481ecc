"""Other projects' networks with their own training recipes at their defaults, on our data and at our training FLOPs.

The networks, losses' processes, schedules of the learning rate and averages are the projects' own objects; only the
loop is ours, so that a run counts its compute, resumes, and is evaluated by the same solver, samples and FID as ours.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from diffscale.diffusion import Diffusion, create_diffusion
from diffscale.models.cost import Cost, count_cost


class AtLogsnr(nn.Module):
    """A network of discrete timesteps as one of logsnr, which is what the solvers ask for.

    logsnr_table (T,): of each timestep, decreasing; between two of them the timestep is interpolated. `pick` takes
    the prediction out of what the network returns.
    """

    logsnr_table: Tensor

    def __init__(self, network: nn.Module, alphas_cumprod: Tensor, pick: Callable[[Any], Tensor]) -> None:
        super().__init__()
        self.network, self.pick = network, pick
        gamma = alphas_cumprod.double().clamp(1e-12, 1 - 1e-12)
        self.register_buffer("logsnr_table", (gamma / (1 - gamma)).log().flip(0))

    def timestep(self, logsnr: Tensor) -> Tensor:
        """(B,) → (B,) float32 between 0 and T − 1."""
        table = self.logsnr_table
        value = logsnr.double().clamp(table[0], table[-1])
        right = torch.searchsorted(table, value).clamp(1, len(table) - 1)
        low, high = table[right - 1], table[right]
        return (len(table) - 1 - (right - 1 + (value - low) / (high - low))).float()

    def forward(
        self, x_in: Tensor, logsnr: Tensor, label: Tensor | None = None, state: Tensor | None = None
    ) -> tuple[Tensor, None]:
        return self.pick(self.network(x_in, self.timestep(logsnr))), None


@dataclass
class Recipe:
    """One peer ready to be trained.

    step: one optimisation step on images (B,C,H,W) in [-1,1], returns its loss. parts: what has a state_dict, by name,
    for the checkpoint. averaged: the network whose samples are evaluated, as AtLogsnr. endpoint: what the learning rate
    has come to at the end (a record's column). device: where all of it is.
    """

    device: torch.device
    batch: int
    flip: bool
    step: Callable[[Tensor], float]
    parts: dict[str, Any]
    averaged: Callable[[], nn.Module]
    diffusion: Diffusion
    schedule: str
    endpoint: str
    cost: Cost
    settings: dict[str, Any]


def diffusers_network(width: int, side: int) -> nn.Module:
    from diffusers import UNet2DModel

    down = ("DownBlock2D",) * 4 + ("AttnDownBlock2D", "DownBlock2D")
    up = ("UpBlock2D", "AttnUpBlock2D") + ("UpBlock2D",) * 4
    channels = tuple(width * m for m in (1, 1, 2, 2, 4, 4))
    return UNet2DModel(  # type: ignore[return-value]
        sample_size=side,
        layers_per_block=2,
        block_out_channels=channels,
        down_block_types=down,
        up_block_types=up,
        norm_num_groups=min(32, width),
    )


def diffusers_cost(width: int, side: int) -> Cost:
    return _cost(lambda: diffusers_network(width, side), side, lambda out: out.sample)


def diffusers_recipe(width: int, side: int, flops: float, device: torch.device) -> Recipe:
    """train_unconditional.py of diffusers' examples at its defaults and with the flags of its README's command
    (--use_ema --random_flip): batch 16, AdamW at 1e-4, cosine with 500 steps of warm-up, DDPM's linear betas, ε. Its
    network's six levels are kept and its width (128) is scaled."""
    from diffusers import DDPMScheduler
    from diffusers.optimization import get_scheduler
    from diffusers.training_utils import EMAModel

    batch = 16
    network = diffusers_network(width, side).to(device)
    cost = diffusers_cost(width, side)
    noise: Any = DDPMScheduler(num_train_timesteps=1000, beta_schedule="linear")
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4, betas=(0.95, 0.999), weight_decay=1e-6, eps=1e-8)
    steps = max(1, round(flops / cost.flops_per_image / batch))
    rate = get_scheduler("cosine", optimizer=optimizer, num_warmup_steps=500, num_training_steps=steps)
    ema = EMAModel(network.parameters(), decay=0.9999, use_ema_warmup=True, inv_gamma=1.0, power=0.75)
    ema.to(device)

    def step(images: Tensor) -> float:
        images = images.to(device)
        eps = torch.randn_like(images)
        t = torch.randint(0, 1000, (len(images),), device=device)
        noisy = noise.add_noise(images, eps, t)
        loss = F.mse_loss(network(noisy, t).sample, eps)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        rate.step()
        optimizer.zero_grad()
        ema.step(network.parameters())
        return loss.item()

    def averaged() -> nn.Module:
        other = diffusers_network(width, side).to(device).eval()
        ema.copy_to(other.parameters())
        return AtLogsnr(other, noise.alphas_cumprod, lambda out: out.sample).to(device)

    return Recipe(
        device,
        batch,
        True,
        step,
        {"network": network, "optimizer": optimizer, "rate": rate, "ema": ema},
        averaged,
        create_diffusion(schedule={"name": "ddpm_linear"}, prediction="eps", weighting={"name": "uniform_eps"}),
        "ddpm_linear",
        "decayed",
        cost,
        {"width": width, "batch": batch, "lr": 1e-4, "lr_schedule": "cosine", "warmup_steps": 500},
    )


def lucidrains_network(width: int) -> nn.Module:
    from denoising_diffusion_pytorch import Unet

    return Unet(dim=width, dim_mults=(1, 2, 4, 8), flash_attn=False)


def lucidrains_cost(width: int, side: int) -> Cost:
    return _cost(lambda: lucidrains_network(width), side, lambda out: out)


def lucidrains_recipe(width: int, side: int, flops: float, device: torch.device) -> Recipe:
    """denoising-diffusion-pytorch's Trainer and GaussianDiffusion at their defaults: batch 16, Adam at 1e-4, sigmoid
    betas, v, average with decay 0.995 every 10 steps. Its README's network is kept and its width (64) is scaled."""
    from denoising_diffusion_pytorch import GaussianDiffusion
    from ema_pytorch import EMA

    batch = 16
    process: Any = GaussianDiffusion(lucidrains_network(width), image_size=side).to(device)
    cost = lucidrains_cost(width, side)
    optimizer = torch.optim.Adam(process.parameters(), lr=1e-4, betas=(0.9, 0.99))
    ema: Any = EMA(process, beta=0.995, update_every=10)

    def step(images: Tensor) -> float:
        loss = process((images.to(device) + 1) / 2)  # it normalises [0, 1] itself
        loss.backward()
        torch.nn.utils.clip_grad_norm_(process.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        ema.update()
        return loss.item()

    def averaged() -> nn.Module:
        other = lucidrains_network(width).to(device).eval()
        other.load_state_dict(ema.ema_model.model.state_dict())
        return AtLogsnr(other, process.alphas_cumprod, lambda out: out).to(device)

    return Recipe(
        device,
        batch,
        True,
        step,
        {"process": process, "optimizer": optimizer, "ema": ema},
        averaged,
        create_diffusion(schedule={"name": "sigmoid_gamma"}, prediction="v", weighting={"name": "uniform_v"}),
        "sigmoid_gamma",
        "constant",
        cost,
        {"width": width, "batch": batch, "lr": 1e-4, "lr_schedule": "constant"},
    )


RECIPES: dict[str, Callable[[int, int, float, torch.device], Recipe]] = {
    "diffusers": diffusers_recipe,
    "denoising-diffusion-pytorch": lucidrains_recipe,
}
COSTS: dict[str, Callable[[int, int], Cost]] = {
    "diffusers": diffusers_cost,
    "denoising-diffusion-pytorch": lucidrains_cost,
}


def _cost(build: Callable[[], nn.Module], side: int, pick: Callable[[Any], Tensor]) -> Cost:
    return count_cost(lambda: AtLogsnr(build(), torch.linspace(0.999, 0.001, 1000), pick), side, 3, 0)
