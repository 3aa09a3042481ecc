"""A run's network as a pipeline of diffusers: its own classes where they compute the same, else our code."""

from __future__ import annotations

import json
from dataclasses import asdict, fields
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from diffscale.config.factory import build_solver
from diffscale.core.errors import UserError
from diffscale.data.autoencoder import CONFIG, KIND, WEIGHTS, Decoder
from diffscale.diffusion.preconditioning import Preconditioning
from diffscale.diffusion.process import SCHEDULES
from diffscale.diffusion.sampling import SOLVERS
from diffscale.interchange import diffusers_dit, diffusers_unet
from diffscale.interchange.definitions import self_contained
from diffscale.interchange.form import Files, Form, Trained, exported_code
from diffscale.models import MODELS
from diffscale.models.dit import DiT
from diffscale.models.unet import UNet

_LOAD = ("from diffusers import DiffusionPipeline", "")
_PIPELINE = 'pipeline = DiffusionPipeline.from_pretrained("FOLDER"{})'
_OWN_CODE = ', custom_pipeline="FOLDER", trust_remote_code=True'


def diffusers_form(trained: Trained) -> Form:
    """Return a folder that DiffusionPipeline.from_pretrained reads and that draws the run's images."""
    try:
        return _in_classes(trained)
    except UserError as error:
        return _in_code(trained, f"{error.setting} = {error.value!r}")


def _in_classes(trained: Trained) -> Form:
    """Return a form in diffusers' own classes. Raises UserError for what they do not compute exactly."""
    model, settings, resolution = trained.model, trained.network, trained.shape["resolution"]
    state: dict[str, Tensor]
    if isinstance(model, UNet):
        config = diffusers_unet.to_config(model, settings, resolution, trained.shape["channels"])
        state, kind, code = diffusers_unet.to_state(model), ["diffusers", "UNet2DModel"], {}
    elif isinstance(model, DiT):
        config, state, kind = (
            diffusers_dit.to_config(settings),
            diffusers_dit.to_state(model),
            ["dit_transformer", "DiT"],
        )
        code = {"network/dit_transformer.py": exported_code("dit_transformer.py")}
    else:
        name = trained.experiment.model.name
        raise UserError(setting="model.name", value=name, expected="unet or dit for diffusers' own classes")
    scheduler = json.dumps(_scheduler(trained), indent=1)
    labelled = trained.shape["num_classes"] > 0
    if trained.decoder is not None and not labelled:
        place = trained.experiment.data.path
        raise UserError(setting="data.path", value=place, expected="images, which a DDPMPipeline draws, not latents")
    part = "network" if labelled else "unet"
    index = {
        "_class_name": ["pipeline", "LabelledDDPMPipeline"] if labelled else "DDPMPipeline",
        part: kind,
        "scheduler": ["diffusers", "DDPMScheduler"],
        **_latents(trained.decoder),
    }
    files: Files = {
        "model_index.json": json.dumps(index, indent=1),
        f"{part}/config.json": json.dumps(config, indent=1),
        f"{part}/{WEIGHTS}": state,
        "scheduler/scheduler_config.json": scheduler,
        **code,
        **_autoencoder(trained.decoder),
    }
    steps = f"num_inference_steps={trained.experiment.eval.solver.steps}"  # type: ignore[attr-defined]
    if not labelled:
        usage = (*_LOAD, _PIPELINE.format(""), f"images = pipeline(batch_size=4, {steps}).images")
        return Form(files, usage, f"A DDPMPipeline of diffusers with its {kind[1]}.")
    usage = (*_LOAD, _PIPELINE.format(_OWN_CODE), f"images = pipeline([0, 1, 2, 3], {steps})  # (B, C, H, W) in [0, 1]")
    about = f"A pipeline of diffusers with its {'UNet2DModel' if kind[0] == 'diffusers' else 'DiTTransformer2DModel'}."
    return Form(files | {"pipeline.py": exported_code("labelled_pipeline.py")}, usage, about)


def _in_code(trained: Trained, why: str) -> Form:
    """Return a form whose network and sampler are code in the folder, taken from diffscale."""
    experiment = trained.experiment
    d, e, name = experiment.diffusion, experiment.eval, experiment.model.name
    network, solver, schedule = MODELS[name], build_solver(experiment), d.schedule.model_dump()
    kind = SCHEDULES[schedule.pop("name")]
    if any(field.name == "resolution" for field in fields(kind)):
        schedule["resolution"] = trained.shape["resolution"]
    guidance = {"scale": e.guidance_scale, "interval": e.guidance_interval, "channels": e.guidance_channels}
    index = {
        "_class_name": ["pipeline", "DiffscalePipeline"],
        "network": [f"{name}_network", "Network"],
        "process": {field.name: getattr(d, field.name) for field in fields(Preconditioning)},
        "schedule": schedule,
        "solver": asdict(solver),
        "guidance": guidance | {"state": e.guidance_state if experiment.carries_state else None},
        **_latents(trained.decoder),
    }
    where = "diffscale.interchange.exported"
    files: Files = {
        "model_index.json": json.dumps(index, indent=1),
        "pipeline.py": self_contained(
            f"{where}.pipeline",
            "DiffscalePipeline",
            {"Solver": SOLVERS[e.solver.name], "TrainingSchedule": kind},
            "Draws images with the network in this folder: the run's process, noise levels and solver.",
        ),
        f"network/{name}_network.py": self_contained(
            f"{where}.network", "Network", {"Architecture": network}, f"The network {network.__name__}."
        ),
        "network/config.json": json.dumps({"_class_name": "Network", "settings": trained.network}, indent=1),
        f"network/{WEIGHTS}": {f"backbone.{key}": tensor for key, tensor in trained.model.state_dict().items()},
        **_autoencoder(trained.decoder),
    }
    labels = "class_labels=[0, 1, 2, 3]" if trained.shape["num_classes"] else "batch_size=4"
    usage = (*_LOAD, _PIPELINE.format(_OWN_CODE), f"images = pipeline({labels})  # (B, C, H, W) in [-1, 1]")
    return Form(files, usage, f"A pipeline of diffusers with its own code, since its classes lack {why}.")


def _latents(decoder: Decoder | None) -> dict[str, Any]:
    """Return the entries of model_index.json with which a pipeline decodes latents."""
    if decoder is None:
        return {}
    shift, scale = list(decoder.shift), list(decoder.scale)
    return {"vae": ["diffusers", KIND], "latent_shift": shift, "latent_scale": scale}


def _autoencoder(decoder: Decoder | None) -> Files:
    """Return the folder of an autoencoder, its weights as they were published."""
    if decoder is None:
        return {}
    place = decoder.autoencoder
    return {f"vae/{CONFIG}": json.dumps(place.config, indent=1), f"vae/{WEIGHTS}": load_file(place.folder / WEIGHTS)}


_BETAS = {"ddpm_linear": ("linear", "ddpm_index"), "iddpm_cosine": ("squaredcos_cap_v2", "adm_index")}
_PREDICTIONS = {"eps": "epsilon", "x0": "sample", "v": "v_prediction"}
_VARIANCES = {"small": "fixed_small", "large": "fixed_large", "learned": "learned_range"}


def _scheduler(trained: Trained) -> dict[str, Any]:
    """Return the configuration of the DDPMScheduler of a process. Raises UserError where there is none."""
    experiment = trained.experiment
    d, solver = experiment.diffusion, experiment.eval.solver
    schedule = d.schedule.model_dump()
    betas, noise_input = _BETAS.get(d.schedule.name, ("", ""))
    variance = getattr(solver, "variance", "learned" if d.variance == "learned_range" else "small")
    for setting, value, valid in (
        ("diffusion.schedule.name", d.schedule.name, tuple(_BETAS)),
        ("diffusion.schedule.steps", schedule.get("steps"), (1000,)),
        ("diffusion.interpolant", d.interpolant, ("vp",)),
        ("diffusion.prediction", d.prediction, tuple(_PREDICTIONS)),
        ("diffusion.input_scale", d.input_scale, (1.0,)),
        ("diffusion.input_range", d.input_range, ("-1,1",)),
        ("diffusion.input_std", d.input_std, ("auto", "none")),
        ("model.noise_input", trained.network["noise_input"], (noise_input,)),
        ("eval.solver.variance", variance, tuple(_VARIANCES)),
        ("eval.solver.clip", solver.clip, ("static", "none")),  # type: ignore[attr-defined]
    ):
        if value not in valid:
            raise UserError(
                setting=setting,
                value=value,
                expected=" or ".join(map(str, valid)) + " for diffusers' DDPMScheduler",
                reason="it gives the network the number of the step, and has no other process",
                fix="--to safetensors",
            )
    linear: dict[str, Any] = {name: schedule[name] for name in ("beta_start", "beta_end") if name in schedule}
    return linear | {
        "_class_name": "DDPMScheduler",
        "num_train_timesteps": schedule["steps"],
        "beta_schedule": betas,
        "variance_type": _VARIANCES[variance],
        "prediction_type": _PREDICTIONS[d.prediction],
        "clip_sample": solver.clip == "static",  # type: ignore[attr-defined]
        "clip_sample_range": 1.0,
        "timestep_spacing": "linspace",  # the respaced steps of iDDPM
    }
