"""Draws images with a network, a process and a solver of diffscale."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from diffscale.diffusion.denoiser import Guidance, GuidedDenoiser
from diffscale.diffusion.preconditioning import Preconditioning
from diffscale.diffusion.sampling import sample_at
from diffscale.diffusion.schedules import SimpleCosine
from diffscale.diffusion.solvers import DDIM

Solver: Any = DDIM  # the exported file has the run's own
TrainingSchedule: Any = SimpleCosine


class DiffscalePipeline(DiffusionPipeline):
    """The run's own sampler. Its parts other than the network are settings in model_index.json."""

    model_cpu_offload_seq = "network->vae"
    _optional_components = ["vae"]  # noqa: RUF012

    def __init__(
        self,
        network: Any,
        vae: Any = None,  # AutoencoderKL of a network of latents
        process: dict[str, Any] | None = None,  # of Preconditioning
        schedule: dict[str, Any] | None = None,  # of TrainingSchedule
        solver: dict[str, Any] | None = None,  # of Solver
        guidance: dict[str, Any] | None = None,  # of Guidance
        latent_shift: list[float] | None = None,  # of each channel: the network's are (latent - shift) * scale
        latent_scale: list[float] | None = None,
    ) -> None:
        super().__init__()
        self.register_modules(network=network, vae=vae)
        self.register_to_config(process=process, schedule=schedule, solver=solver, guidance=guidance)
        self.register_to_config(latent_shift=latent_shift, latent_scale=latent_scale)

    @torch.no_grad()
    def __call__(
        self,
        class_labels: Sequence[int] | None = None,
        batch_size: int = 1,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
    ) -> Tensor:
        """Return images (B, C, H, W) in [−1, 1], or latents if no autoencoder of them is known.

        class_labels: one number for each image; None draws `batch_size` images without a class
        num_inference_steps, guidance_scale: None takes the run's own
        latents: the unit normal noise to begin with, (B, C, H, W)
        """
        settings, c = self.network.config.settings, self.config
        labels = None if class_labels is None else torch.as_tensor(class_labels, device=self.device)
        count = batch_size if labels is None else len(labels)
        shape = (count, settings["channels"], settings["resolution"], settings["resolution"])

        def normal(*_: int) -> Tensor:
            return randn_tensor(shape, generator=generator, device=self.device)

        solver = Solver(**c.solver)
        solver = solver if num_inference_steps is None else replace(solver, steps=num_inference_steps)
        guidance = Guidance(**c.guidance)
        scale = guidance.scale if guidance_scale is None else guidance_scale
        guidance = replace(guidance, scale=scale if labels is not None else 1.0)
        denoiser = GuidedDenoiser(Preconditioning(**c.process), self.network, labels, guidance, {})
        levels = solver.logsnr_grid(TrainingSchedule(**c.schedule))
        start = normal() if latents is None else latents.to(self.device)
        images = sample_at(levels, solver, denoiser, start, normal)
        if self.vae is not None:
            shift, scale = (
                torch.tensor(n, device=self.device)[:, None, None] for n in (c.latent_shift, c.latent_scale)
            )
            images = self.vae.decode(images / scale + shift).sample
        elif settings["channels"] not in (1, 3):
            return images
        return images.clamp(-1, 1)
