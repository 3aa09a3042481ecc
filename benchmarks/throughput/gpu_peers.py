"""The training loops that others publish, around a given network: their optimizer, averages, precision and waiting.

Each function returns a call that makes one step on images (B, C, H, W) in [-1, 1] that are already on the device.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.backends import cuda, cudnn

Step = Callable[[], Any]


def with_switches(step: Step, *, tf32: bool, benchmark: bool) -> Step:
    """Return the step under the switches that its project sets for the process. Ours are put back after each call."""

    def call() -> None:
        before = cuda.matmul.allow_tf32, cudnn.allow_tf32, cudnn.benchmark, cudnn.deterministic
        attention, deterministic = cuda.cudnn_sdp_enabled(), torch.are_deterministic_algorithms_enabled()
        cuda.matmul.allow_tf32 = cudnn.allow_tf32 = tf32
        cudnn.benchmark, cudnn.deterministic = benchmark, False
        cuda.enable_cudnn_sdp(True)
        torch.use_deterministic_algorithms(False)
        try:
            step()
        finally:
            cuda.matmul.allow_tf32, cudnn.allow_tf32, cudnn.benchmark, cudnn.deterministic = before
            cuda.enable_cudnn_sdp(attention)
            torch.use_deterministic_algorithms(deterministic)

    return call


def diffusers_example(network: nn.Module, images: Tensor, *, low: bool = True) -> Step:
    """The unconditional example of diffusers 0.42 with its defaults and --use_ema.

    AdamW (0.95, 0.999), weight decay 1e-6, cosine schedule with warm-up, gradients clipped to 1, diffusers' EMAModel,
    and the loss read in every step for its progress bar.

    network: diffusers' UNet2DModel
    low: bf16, its --mixed_precision
    """
    from diffusers import DDPMScheduler
    from diffusers.optimization import get_scheduler
    from diffusers.training_utils import EMAModel

    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4, betas=(0.95, 0.999), weight_decay=1e-6, eps=1e-8)
    rate = get_scheduler("cosine", optimizer=optimizer, num_warmup_steps=500, num_training_steps=100_000)
    average = EMAModel(network.parameters(), decay=0.9999, use_ema_warmup=True, inv_gamma=1.0, power=0.75)
    noising: Any = DDPMScheduler(num_train_timesteps=1000, beta_schedule="linear")
    device = images.device

    def step() -> None:
        noise = torch.randn(images.shape, device=device)
        t = torch.randint(0, 1000, (len(images),), device=device).long()
        noisy = noising.add_noise(images, noise, t)
        with torch.autocast(device.type, torch.bfloat16, enabled=low):
            predicted = network(noisy, t).sample
        loss = nn.functional.mse_loss(predicted.float(), noise.float())
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        rate.step()
        optimizer.zero_grad()
        average.step(network.parameters())
        loss.detach().item()

    return with_switches(step, tf32=False, benchmark=False)


def dit_loop(network: nn.Module, images: Tensor, labels: Tensor | None) -> Step:
    """DiT's train.py: float32 with TF32, AdamW without weight decay, an average parameter by parameter, loss.item().

    network: a Backbone; the noise is predicted over 1,000 linear steps, as with its diffusion of OpenAI's
    """
    average = copy.deepcopy(network)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4, weight_decay=0)
    bars = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)
    root, rest, logsnr = (
        v.float().to(images.device) for v in (bars.sqrt(), (1 - bars).sqrt(), (bars / (1 - bars)).log())
    )

    def step() -> None:
        t = torch.randint(0, 1000, (len(images),), device=images.device)
        noise = torch.randn_like(images)
        noisy = root[t][:, None, None, None] * images + rest[t][:, None, None, None] * noise
        loss = (network(noisy, logsnr[t], labels)[0] - noise).square().mean(dim=(1, 2, 3)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            for mean, parameter in zip(average.parameters(), network.parameters(), strict=True):
                mean.mul_(0.9999).add_(parameter.data, alpha=1 - 0.9999)
        loss.item()

    return with_switches(step, tf32=True, benchmark=False)


def edm_loop(network: nn.Module, images: Tensor, labels: Tensor | None, *, low: bool = True) -> Step:
    """EDM's training loop: Adam, a learning rate set in each group, `nan_to_num` for each gradient, its average.

    cudnn.benchmark is on and TF32 off. The loss stays on the device until a tick, 50,000 images apart.

    network: a Backbone, preconditioned as in EDM's table 1
    low: bf16, in place of its fp16 within the network
    """
    average = copy.deepcopy(network).eval().requires_grad_(False)
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3, betas=(0.9, 0.999), eps=1e-8)
    data, seen = 0.5, 0

    def step() -> None:
        nonlocal seen
        optimizer.zero_grad(set_to_none=True)
        sigma = (torch.randn([len(images), 1, 1, 1], device=images.device) * 1.2 - 1.2).exp()
        noisy = images + torch.randn_like(images) * sigma
        total = sigma.square() + data**2
        with torch.autocast(images.device.type, torch.bfloat16, enabled=low):
            out = network(noisy / total.sqrt(), -2 * sigma.flatten().log(), labels)[0]
        denoised = data**2 / total * noisy + sigma * data / total.sqrt() * out.float()
        loss = total / (sigma * data).square() * (denoised - images).square()
        loss.sum().mul(1 / len(images)).backward()
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * min(seen / 10e6, 1)
        for parameter in network.parameters():
            if parameter.grad is not None:
                torch.nan_to_num(parameter.grad, nan=0, posinf=1e5, neginf=-1e5, out=parameter.grad)
        optimizer.step()
        seen += len(images)
        beta = 0.5 ** (len(images) / max(min(500e3, seen * 0.05), 1e-8))
        for mean, parameter in zip(average.parameters(), network.parameters(), strict=True):
            mean.copy_(parameter.detach().lerp(mean, beta))

    return with_switches(step, tf32=False, benchmark=True)
