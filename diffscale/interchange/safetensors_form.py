"""A run's network as plain safetensors with what builds it, and an example that draws four images."""

from __future__ import annotations

import json
from dataclasses import asdict

from diffscale.config.factory import build_solver
from diffscale.interchange.form import Files, Form, Trained, exported_code


def safetensors_form(trained: Trained) -> Form:
    """Return the weights, what builds network, process and sampler, and an example that draws four images."""
    d, model = trained.experiment.diffusion, trained.experiment.model
    config = {
        "model": {"name": model.name, **trained.network},
        "diffusion": {
            "schedule": d.schedule.model_dump(),
            "weighting": d.weighting.model_dump(),
            **{name: getattr(d, name) for name in ("interpolant", "prediction", "input_scale", "input_range")},
            **{name: getattr(d, name) for name in ("input_std", "sigma_data", "multiscale_loss")},
            **{name: getattr(d, name) for name in ("discrete", "variance", "vlb_weight")},
            "resolution": trained.shape["resolution"],
        },
        "sampler": {"name": trained.experiment.eval.solver.name, **asdict(build_solver(trained.experiment))},
        "images_seen": trained.images_seen,
        "ema": trained.ema,
    }
    about = "Weights for diffscale, with what builds the network."
    if (decoder := trained.decoder) is not None:
        config["latents"] = {"autoencoder": decoder.name, "shift": decoder.shift, "scale": decoder.scale}
        about += " It draws latents: the autoencoder named in config.json decodes latent / scale + shift."
    example = exported_code("example.py")
    files: Files = {
        "model.safetensors": dict(trained.model.state_dict()),
        "config.json": json.dumps(config, indent=1),
        "example.py": example,
    }
    return Form(files, tuple(example.rstrip().splitlines()), about)
