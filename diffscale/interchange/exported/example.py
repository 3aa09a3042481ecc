"""Draws four images."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file

from diffscale.diffusion import SOLVERS, create_diffusion, keyed_noise, sample
from diffscale.models import create_model

folder = Path(__file__).parent
config = json.loads((folder / "config.json").read_text())
model = create_model(**config["model"]).eval()
model.load_state_dict(load_file(folder / "model.safetensors"))
diffusion, solver = create_diffusion(**config["diffusion"]), SOLVERS[config["sampler"].pop("name")](**config["sampler"])
shape = (config["model"]["channels"], config["model"]["resolution"], config["model"]["resolution"])
label = torch.arange(4) % model.num_classes if getattr(model, "num_classes", 0) else None
noise = torch.randn(4, *shape, generator=torch.Generator().manual_seed(0))
images = sample(diffusion, model, noise, solver=solver, label=label, noise_fn=keyed_noise(0, torch.arange(4), shape))
torch.save(images, "images.pt")  # (4, C, H, W) in [-1, 1]
