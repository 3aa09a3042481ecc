"""Draws images of classes with a network of diffusers that has a class for "no label", which is the last one.

A network of latents has the autoencoder that decodes them.
"""

import torch
from diffusers import DiffusionPipeline
from diffusers.utils.torch_utils import randn_tensor


class LabelledDDPMPipeline(DiffusionPipeline):
    model_cpu_offload_seq = "network->vae"
    _optional_components = ["vae"]  # noqa: RUF012

    def __init__(self, network, scheduler, vae=None, latent_shift=None, latent_scale=None):
        """latent_shift, latent_scale: of each channel; the network's latents are (latent - shift) * scale"""
        super().__init__()
        self.register_modules(network=network, scheduler=scheduler, vae=vae)
        self.register_to_config(latent_shift=latent_shift, latent_scale=latent_scale)

    @torch.no_grad()
    def __call__(self, class_labels, guidance_scale=1.0, num_inference_steps=1000, generator=None):
        """class_labels: a list of numbers. Returns images (B, C, H, W) in [0, 1]."""
        config, device = self.network.config, self.device
        labels = torch.as_tensor(class_labels, device=device)
        last = config.num_class_embeds - 1 if "num_class_embeds" in config else config.num_embeds_ada_norm
        none = torch.full_like(labels, last)
        shape = (len(labels), config.in_channels, config.sample_size, config.sample_size)
        image = randn_tensor(shape, generator=generator, device=device, dtype=self.network.dtype)
        self.scheduler.set_timesteps(num_inference_steps)
        for t in self.scheduler.timesteps:
            step = t.expand(len(labels)).to(device)
            out = self.network(image, step, class_labels=labels).sample
            if guidance_scale != 1:
                other = self.network(image, step, class_labels=none).sample
                c = config.in_channels  # a learned variance is that of the label
                out = torch.cat([torch.lerp(other[:, :c], out[:, :c], guidance_scale), out[:, c:]], dim=1)
            image = self.scheduler.step(out, t, image, generator=generator).prev_sample
        if self.vae is not None:
            numbers = self.config.latent_shift, self.config.latent_scale
            shift, scale = (torch.tensor(n, device=device)[:, None, None] for n in numbers)
            image = self.vae.decode(image / scale + shift).sample
        return (image / 2 + 0.5).clamp(0, 1)
