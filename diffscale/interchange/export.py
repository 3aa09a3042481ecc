"""Writes a run's network as a folder for others: plain safetensors with a configuration, or a pipeline of diffusers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from diffscale.config.experiment import Experiment
from diffscale.config.factory import build_solver
from diffscale.core.errors import UserError
from diffscale.core.progress import working
from diffscale.interchange import diffusers_unet
from diffscale.interchange.import_run import imported_from
from diffscale.interchange.model_card import model_card
from diffscale.models.unet import UNet
from diffscale.training.checkpoint import layout as ck
from diffscale.training.load import is_run, list_targets, settings_of_run

Files = dict[str, str | dict[str, Tensor]]
"""Text or tensors by the path of a file in the folder."""

EXAMPLE = """\
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
"""

PIPELINE = '''\
"""Draws images of classes with a UNet2DModel that has a class for "no label", which is the last one."""

import torch
from diffusers import DiffusionPipeline
from diffusers.utils.torch_utils import randn_tensor


class LabelledDDPMPipeline(DiffusionPipeline):
    model_cpu_offload_seq = "unet"

    def __init__(self, unet, scheduler):
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler)

    @torch.no_grad()
    def __call__(self, class_labels, guidance_scale=1.0, num_inference_steps=1000, generator=None):
        """class_labels: a list of numbers. Returns images (B, C, H, W) in [0, 1]."""
        config, device = self.unet.config, self.device
        labels = torch.as_tensor(class_labels, device=device)
        none = torch.full_like(labels, config.num_class_embeds - 1)
        shape = (len(labels), config.in_channels, config.sample_size, config.sample_size)
        image = randn_tensor(shape, generator=generator, device=device, dtype=self.unet.dtype)
        self.scheduler.set_timesteps(num_inference_steps)
        for t in self.scheduler.timesteps:
            out = self.unet(image, t, class_labels=labels).sample
            if guidance_scale != 1:
                other = self.unet(image, t, class_labels=none).sample
                c = config.in_channels  # a learned variance is that of the label
                out = torch.cat([torch.lerp(other[:, :c], out[:, :c], guidance_scale), out[:, c:]], dim=1)
            image = self.scheduler.step(out, t, image, generator=generator).prev_sample
        return (image / 2 + 0.5).clamp(0, 1)
'''


@dataclass(frozen=True)
class Trained:
    """What is exported: one checkpoint with one average of its weights."""

    experiment: Experiment
    model: nn.Module
    shape: dict[str, int]  # resolution, channels, num_classes
    images_seen: int
    ema: str
    run_folder: str


def export_run(target: str, out: Path, to: str, ema: str = "", checkpoint: str = "last", licence: str = "") -> Path:
    """Write a run's network into a new folder and return it.

    Raises UserError before anything is written: for a folder that is not empty, an unknown form, and a network or a
    process that the form does not have.

    target: a run's folder or a checkpoint
    to: diffusers or safetensors
    ema: average of the weights; empty for that of eval.ema
    checkpoint: last, or images seen
    licence: of the weights, for the model card; empty says that none is stated
    """
    if to not in FORMS:
        raise UserError(setting="--to", value=to, expected=" or ".join(FORMS))
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(setting="OUT", value=str(out), expected="a folder that is new or empty")
    if not is_run(target):
        raise UserError(setting="RUN", value=target, expected="a run's folder or a checkpoint of one")
    uri = list_targets(target, checkpoint)[-1]
    experiment = settings_of_run(uri)
    average = ema or experiment.eval.ema
    with working(f"reading {uri}", unit=""):
        _, model, images, columns = ck.load_for_sampling(uri, average)
    shape = {name: int(ck.read_state(uri)["data"][name]) for name in ("resolution", "channels", "num_classes")}
    trained = Trained(experiment, model, shape, images, ck.ema_name(average), ck.run_of(uri))
    files = FORMS[to](trained)
    about = imported_from(trained.run_folder)
    files["README.md"] = model_card(
        experiment, columns, run_folder=trained.run_folder, ema=trained.ema, to=to, imported=about, licence=licence
    )
    with working(f"writing {out}", unit=""):
        _write(out, files)
    return out


def _safetensors(trained: Trained) -> Files:
    """Return the weights, what builds network, process and sampler, and an example that draws four images."""
    d, model = trained.experiment.diffusion, trained.experiment.model
    config = {
        "model": {"name": model.name, **trained.shape, **model.arguments()},
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
    weights = {name: tensor.contiguous() for name, tensor in trained.model.state_dict().items()}
    return {"model.safetensors": weights, "config.json": json.dumps(config, indent=1), "example.py": EXAMPLE}


def _diffusers(trained: Trained) -> Files:
    """Return the parts of a pipeline of diffusers. Raises UserError for what its classes do not compute exactly."""
    if not isinstance(trained.model, UNet):
        raise UserError(
            setting="model.name",
            value=trained.experiment.model.name,
            expected="unet for --to diffusers",
            reason="diffusers has no class that computes exactly what this network does",
            fix="--to safetensors",
        )
    settings = trained.experiment.model.arguments()
    config = diffusers_unet.to_config(trained.model, settings, trained.shape["resolution"], trained.shape["channels"])
    labelled = trained.shape["num_classes"] > 0
    index: dict[str, Any] = {
        "_class_name": ["pipeline", "LabelledDDPMPipeline"] if labelled else "DDPMPipeline",
        "unet": ["diffusers", "UNet2DModel"],
        "scheduler": ["diffusers", "DDPMScheduler"],
    }
    files: Files = {
        "model_index.json": json.dumps(index, indent=1),
        "unet/config.json": json.dumps(config, indent=1),
        "unet/diffusion_pytorch_model.safetensors": diffusers_unet.to_state(trained.model),
        "scheduler/scheduler_config.json": json.dumps(_scheduler(trained.experiment, settings), indent=1),
    }
    return files | ({"pipeline.py": PIPELINE} if labelled else {})


_BETAS = {"ddpm_linear": ("linear", "ddpm_index"), "iddpm_cosine": ("squaredcos_cap_v2", "adm_index")}
_PREDICTIONS = {"eps": "epsilon", "x0": "sample", "v": "v_prediction"}
_VARIANCES = {"small": "fixed_small", "large": "fixed_large", "learned": "learned_range"}


def _scheduler(experiment: Experiment, settings: dict[str, Any]) -> dict[str, Any]:
    """Return the configuration of the DDPMScheduler of a process. Raises UserError where there is none."""
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
        ("model.noise_input", settings["noise_input"], (noise_input,)),
        ("eval.solver.variance", variance, tuple(_VARIANCES)),
        ("eval.solver.clip", solver.clip, ("static", "none")),  # type: ignore[attr-defined]
    ):
        if value not in valid:
            raise UserError(
                setting=setting,
                value=value,
                expected=" or ".join(map(str, valid)) + " for --to diffusers",
                reason="diffusers' DDPMScheduler gives the network the number of the step, and has no other process",
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


FORMS: dict[str, Callable[[Trained], Files]] = {"diffusers": _diffusers, "safetensors": _safetensors}


def _write(out: Path, files: Files) -> None:
    """Write the files into a new folder next to its place and rename it, so that it is whole or absent."""
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        for name, content in files.items():
            path = partial / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(content, str):
                path.write_text(content, encoding="utf-8")
            else:
                save_file({key: _own(tensor) for key, tensor in content.items()}, path, {"format": "pt"})
        if out.exists():
            out.rmdir()
        partial.rename(out)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise UserError(setting="OUT", value=str(out), expected="a place to write to", reason=str(error)) from None


def _own(tensor: Tensor) -> Tensor:
    """Return the tensor in memory of its own, in the usual order."""
    return tensor.detach().clone(memory_format=torch.contiguous_format)
