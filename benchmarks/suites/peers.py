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

from diffscale.core.errors import require_package
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


class AtFlowTime(nn.Module):
    """torchcfm's network, which takes the time of the flow and gives the velocity towards the image, as one of logsnr.

    Its time is 1 at the image, so it is alpha of our linear interpolant, whose logsnr is 2 ln(time / (1 - time)); its
    velocity is image minus noise, the negative of our u.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(
        self, x_in: Tensor, logsnr: Tensor, label: Tensor | None = None, state: Tensor | None = None
    ) -> tuple[Tensor, None]:
        return -self.network(torch.sigmoid(logsnr / 2), x_in), None


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


def torchcfm_network(width: int, side: int) -> nn.Module:
    """Return the network of torchcfm's CIFAR-10 example, narrow: `width` channels at every level, one attention head.

    At its published width a group of the normalisation has four channels. Its code fixes 32 groups whatever the width,
    which would leave one channel in each, so the groups are set here.
    """
    from torchcfm.models.unet.unet import UNetModelWrapper

    network = UNetModelWrapper(
        dim=(3, side, side),
        num_res_blocks=2,
        num_channels=width,
        channel_mult=[1, 1, 1, 1],
        num_heads=4,
        num_head_channels=width,
        attention_resolutions="16",
        dropout=0.1,
    )
    for module in network.modules():
        if isinstance(module, nn.GroupNorm):
            module.num_groups = min(32, module.num_channels // 4)
    return network


def torchcfm_cost(width: int, side: int) -> Cost:
    return count_cost(lambda: AtFlowTime(torchcfm_network(width, side)), side, 3, 0)


def torchcfm_recipe(
    width: int,
    side: int,
    flops: float,
    device: torch.device,
    lr: float = 2e-4,
    warmup: int = 5000,
    batch_size: int = 128,
    ema_decay: float = 0.9999,
) -> Recipe:
    """examples/images/cifar10/train_cifar10.py of torchcfm with --model icfm: the step is its loop's, line by line.

    lr, warmup (steps), batch_size and ema_decay are flags of that script, with its defaults.
    """
    from torchcfm.conditional_flow_matching import ConditionalFlowMatcher

    network = torchcfm_network(width, side).to(device)
    average = torchcfm_network(width, side).to(device).eval().requires_grad_(False)
    average.load_state_dict(network.state_dict())
    optimizer = torch.optim.Adam(network.parameters(), lr=lr)
    rate = torch.optim.lr_scheduler.LambdaLR(optimizer, lr_lambda=lambda step: min(step, warmup) / warmup)
    matcher = ConditionalFlowMatcher(sigma=0.0)

    def step(images: Tensor) -> float:
        optimizer.zero_grad()
        x1 = images.to(device)
        t, xt, ut = matcher.sample_location_and_conditional_flow(torch.randn_like(x1), x1)
        loss = torch.mean((network(t, xt) - ut) ** 2)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        rate.step()
        with torch.no_grad():
            for mine, theirs in zip(average.parameters(), network.parameters(), strict=True):
                mine.copy_(mine * ema_decay + theirs * (1 - ema_decay))
        return loss.item()

    return Recipe(
        device,
        batch_size,
        True,
        step,
        {"network": network, "average": average, "optimizer": optimizer, "rate": rate},
        lambda: AtFlowTime(average),
        create_diffusion(
            schedule={"name": "flow_uniform"}, interpolant="linear", prediction="u", weighting={"name": "uniform_u"}
        ),
        "flow_uniform",
        "constant",
        torchcfm_cost(width, side),
        {"width": width, "batch": batch_size, "lr": lr, "lr_schedule": "constant", "warmup_steps": warmup}
        | {"ema_decay": ema_decay},
    )


RECIPES: dict[str, Callable[..., Recipe]] = {  # (width, side, flops, device, **flags of the peer's own script)
    "diffusers": diffusers_recipe,
    "denoising-diffusion-pytorch": lucidrains_recipe,
    "torchcfm": torchcfm_recipe,
}
COSTS: dict[str, Callable[[int, int], Cost]] = {
    "diffusers": diffusers_cost,
    "denoising-diffusion-pytorch": lucidrains_cost,
    "torchcfm": torchcfm_cost,
}
INSTALL = {  # torchcfm's other dependencies are not needed here
    "diffusers": "make install-peers",
    "denoising-diffusion-pytorch": "make install-peers",
    "torchcfm": "pip install --no-deps torchcfm pot",
}


def require(peer: str) -> None:
    """Raise UserError if the package of a peer is not installed."""
    require_package(peer.replace("-", "_"), setting="peers", value=peer, fix=INSTALL[peer])


def _cost(build: Callable[[], nn.Module], side: int, pick: Callable[[Any], Tensor]) -> Cost:
    return count_cost(lambda: AtLogsnr(build(), torch.linspace(0.999, 0.001, 1000), pick), side, 3, 0)
