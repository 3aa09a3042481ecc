"""Exported models give the run's images: through diffusers' own pipelines, and through the example in the folder."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor, nn

from diffscale.config.factory import build_diffusion, build_model, build_solver, open_decoder, open_training_data
from diffscale.config.load import load_tree, merge, validate
from diffscale.core.errors import UserError
from diffscale.core.hashing import digest_of
from diffscale.diffusion import Guidance, sample
from diffscale.interchange.export import export_run
from diffscale.interchange.import_run import import_run
from diffscale.models.cost import count_cost
from diffscale.records.schema import Record
from diffscale.training.checkpoint import layout as ck
from diffscale.training.checkpoint.tensors import write_group
from diffscale.training.parallel import World
from diffscale.training.record_columns import record_columns

SMALL: dict[str, dict[str, Any]] = {
    "unet": {"model_channels": 128, "channel_mult": [1, 2], "num_blocks": 1, "attn_resolutions": [4], "dropout": 0},
    "edm2": {"model_channels": 32, "channel_mult": [1, 2], "num_blocks": 1, "attn_resolutions": [4]},
    "uvit": {"conv_widths": [32], "conv_blocks": 1, "width": 64, "depth": 2, "num_heads": 2, "embedding_width": 64},
    "rin": {"latents": 8, "latent_width": 64, "interface_width": 32, "num_blocks": 2, "layers": 1, "latent_heads": 4},
    "dit": {"width": 32, "depth": 2, "num_heads": 2, "patch_size": 2, "out_channels": 6},
    "jit": {
        "width": 48,
        "depth": 4,
        "num_heads": 2,
        "context_tokens": 4,
        "context_start": 1,
        "bottleneck": 16,
        "patch_size": 2,
    },
    "hdit": {"widths": [64, 128], "depths": [1, 1], "mapping_width": 64, "patch_size": 2, "kernel": 3},
}
"""Settings that make each network small, at eight pixels."""
PROCESSES: dict[str, dict[str, Any]] = {
    "ddpm": {"recipe": "ddpm-cifar10", "eval": {"solver": {"steps": 8}}},
    "iddpm": {"recipe": "adm-imagenet64", "data": {"class_conditional": False}, "eval": {"solver": {"steps": 8}}},
    "adm": {"recipe": "adm-imagenet64", "eval": {"solver": {"steps": 8}}},
    "dit": {"recipe": "dit-b-4", "eval": {"solver": {"steps": 8, "clip": "static"}}},
}
"""Recipes that diffusers' own classes compute, made small."""


def make_run(folder: Path, recipe: str, **changes: Any) -> tuple[str, nn.Module, Any]:
    """A run with random weights, as training leaves it. Returns its folder, network and settings."""
    tree = merge(load_tree(recipe), {"storage": str(folder), "train": {"images": 64, "precision": "fp32"}})
    tree = merge(tree, {"model": SMALL[tree["model"]["name"]]})
    tree = merge(tree, {"data": {"path": "builtin:emoji", "resolution": 8}, "eval": {"ema": "none"}})
    experiment = validate(merge(tree, changes))
    dataset = open_training_data(experiment)
    torch.manual_seed(0)
    model = build_model(experiment, dataset).eval()
    with torch.no_grad():
        for parameter in filter(lambda p: p.requires_grad, model.parameters()):
            parameter += 0.02 * torch.randn_like(parameter)
    classes = experiment.num_classes(dataset)
    cost = count_cost(lambda: build_model(experiment, dataset), 8, dataset.channels, classes)
    columns = record_columns(experiment, dataset, cost, World(), 64, 1.0, None, None, "fp32", 1)
    run = experiment.run_folder(dataset.content_hash)
    checkpoint = ck.folder_of(run, 64)
    files = write_group(checkpoint, "model", model.state_dict(), {}, 0, 1)
    shape = {"resolution": 8, "channels": dataset.channels, "num_classes": classes}
    state = {"images_seen": 64, "record": columns, "data": shape}
    for name, data in (("state.json", json.dumps(state).encode()), ("experiment.yaml", ck.save_settings(experiment))):
        Path(checkpoint, name).write_bytes(data)
        files[name] = digest_of(str(Path(checkpoint, name)))
    ck.complete(checkpoint, files)
    return run, model, experiment


def ours(model: nn.Module, experiment: Any, seed: int, label: Tensor | None) -> Tensor:
    """Images of the run, from the noise that diffusers' pipelines draw with a generator of this seed."""
    generator, dataset = torch.Generator().manual_seed(seed), open_training_data(experiment)
    shape = (2, dataset.channels, 8, 8)
    start = torch.randn(shape, generator=generator)
    diffusion, decoder = build_diffusion(experiment, dataset), open_decoder(experiment, dataset)
    settings = experiment.eval
    state = settings.guidance_state if experiment.carries_state else None
    images = sample(
        diffusion,
        model,
        start,
        solver=build_solver(experiment),
        label=label,
        guidance=Guidance(settings.guidance_scale, settings.guidance_interval, None, state, settings.guidance_channels),
        noise_fn=lambda step: torch.randn(shape, generator=generator),
    )
    images = images if decoder is None else decoder.decode(images)
    return (images / 2 + 0.5).clamp(0, 1)


@pytest.mark.parametrize("name", PROCESSES)
def test_diffusers_draws_the_same_images(name: str, tmp_path: Path):
    from diffusers import DiffusionPipeline

    changes = dict(PROCESSES[name])
    run, model, experiment = make_run(tmp_path / "runs", changes.pop("recipe"), **changes)
    out = export_run(run, tmp_path / "out", "diffusers")
    classes = getattr(model, "num_classes", 0)
    generator = torch.Generator().manual_seed(3)
    if classes:
        pipeline = DiffusionPipeline.from_pretrained(out, custom_pipeline=str(out), trust_remote_code=True)
        theirs = pipeline([1, 2], num_inference_steps=8, generator=generator)
    else:
        pipeline = DiffusionPipeline.from_pretrained(out)
        pipeline.set_progress_bar_config(disable=True)
        given = {"batch_size": 2, "num_inference_steps": 8, "generator": generator, "output_type": "np"}
        theirs = torch.from_numpy(pipeline(**given).images).permute(0, 3, 1, 2)
    label = torch.tensor([1, 2]) if classes else None
    torch.testing.assert_close(ours(model, experiment, 3, label), theirs, rtol=0, atol=1e-4)


def test_a_models_folder_comes_back_as_a_run(tmp_path: Path):
    """Through diffusers' files: exported, imported, and the same weights."""
    run, model, _ = make_run(tmp_path / "runs", "ddpm-cifar10")
    out = export_run(run, tmp_path / "out", "diffusers")
    settings = [f"storage={tmp_path / 'imported'}", "data.path=builtin:emoji"]
    again = import_run(out / "unet", "diffusers", settings)
    (checkpoint,) = ck.list_checkpoints(again)
    weights = ck.read_weights(checkpoint, "none")
    for key, tensor in model.state_dict().items():
        assert torch.equal(weights[key], tensor), key
    config = json.loads((out / "unet" / "config.json").read_text())
    (out / "unet" / "config.json").write_text(json.dumps(config | {"down_block_types": ["SkipDownBlock2D"] * 2}))
    with pytest.raises(UserError, match="SkipDownBlock2D"):
        import_run(out / "unet", "diffusers", settings)


def test_the_example_in_the_folder_draws_the_runs_images(tmp_path: Path):
    run, model, experiment = make_run(tmp_path / "runs", "edm-cifar10", model={"augment_dim": 9, "resample": "block"})
    out = export_run(run, tmp_path / "out", "safetensors")
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(out / "example.py")],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    from diffscale.diffusion import keyed_noise

    start = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    diffusion = build_diffusion(experiment, open_training_data(experiment))
    noise_fn = keyed_noise(0, torch.arange(4), (3, 8, 8))
    expected = sample(diffusion, model, start, solver=build_solver(experiment), noise_fn=noise_fn)
    torch.testing.assert_close(torch.load(tmp_path / "images.pt", weights_only=True), expected, rtol=0, atol=1e-4)


OWN_CODE: dict[str, dict[str, Any]] = {
    "edm-cifar10": {"eval": {"solver": {"steps": 4, "s_churn": 2}}},
    "edm2-imagenet64-xs": {"eval": {"solver": {"steps": 4}}},
    "sid-imagenet128": {"eval": {"solver": {"steps": 4}}},
    "rin-cifar10": {"eval": {"solver": {"steps": 4}}},
    "jit-b-16": {"eval": {"solver": {"steps": 4}}},
    "hdit-imagenet128": {"eval": {"solver": {"steps": 4}}},
    "dit-xl-2": {"model": {"positions": "learned"}, "eval": {"guidance_scale": 2, "solver": {"steps": 8}}},
}
"""Recipes that diffusers' classes do not compute: every network, solvers with and without noise, guidance."""


@pytest.mark.parametrize("recipe", OWN_CODE)
def test_code_in_the_folder_draws_the_same_images(recipe: str, tmp_path: Path):
    """The folder's code is loaded in a process that cannot import diffscale."""
    run, model, experiment = make_run(tmp_path / "runs", recipe, **OWN_CODE[recipe])
    out = export_run(run, tmp_path / "out", "diffusers")
    classes = getattr(model, "num_classes", 0)
    given = "class_labels=[1, 2]" if classes else "batch_size=2"
    script = f"""
import sys, torch
sys.modules["diffscale"] = None
from diffusers import DiffusionPipeline
pipeline = DiffusionPipeline.from_pretrained({str(out)!r}, custom_pipeline={str(out)!r}, trust_remote_code=True)
torch.save(pipeline({given}, generator=torch.Generator().manual_seed(3)), {str(tmp_path / "images.pt")!r})
"""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 0, done.stderr
    theirs = torch.load(tmp_path / "images.pt", weights_only=True)
    label = torch.tensor([1, 2]) if classes else None
    torch.testing.assert_close(ours(model, experiment, 3, label), (theirs / 2 + 0.5), rtol=0, atol=1e-4)
    assert len((out / "pipeline.py").read_text().splitlines()) < 800


@pytest.mark.parametrize(
    ("recipe", "changes", "said"),
    [
        ("edm-cifar10", {}, "model."),
        ("ddpm-cifar10", {"model": {"noise_input": "ddpm"}}, "model.noise_input"),
        ("ddpm-cifar10", {"model": {"model_channels": 32}}, "model.channel_mult"),
        ("ddpm-cifar10", {"diffusion": {"schedule": "simple_cosine", "discrete": False}}, "diffusion.schedule.name"),
    ],
)
def test_the_card_says_what_diffusers_own_classes_lack(recipe: str, changes: dict[str, Any], said: str, tmp_path: Path):
    if "schedule" in changes.get("diffusion", {}):
        changes = changes | {"eval": {"solver": {"grid": "uniform_t"}}}
    run, _, _ = make_run(tmp_path / "runs", recipe, **changes)
    out = export_run(run, tmp_path / "out", "diffusers")
    assert f"its classes lack {said}" in (out / "README.md").read_text()


def test_a_folder_that_is_not_empty_and_an_unknown_form_are_refused(tmp_path: Path):
    run, _, _ = make_run(tmp_path / "runs", "ddpm-cifar10")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match="new or empty"):
        export_run(run, tmp_path / "out", "safetensors")
    with pytest.raises(UserError, match="--to"):
        export_run(run, tmp_path / "other", "onnx")


def test_the_card_says_data_cost_metrics_and_licence(tmp_path: Path):
    run, _, experiment = make_run(tmp_path / "runs", "ddpm-cifar10")
    (checkpoint,) = ck.list_checkpoints(run)
    columns = ck.read_state(checkpoint)["record"]
    more = {"record_id": "r1", "created": "2026-01-01T00:00:00+00:00", "ema": "none", "metric": "fid", "value": 12.5}
    more |= {"value_low": 12.0, "value_high": 13.0, "network": "inception", "resize": "tf1", "eval_resolution": 8}
    more |= {
        "reference": "abc",
        "n_generated": 5000,
        "n_reference": 50000,
        "solver": "ddpm",
        "nfe": 1000,
        "sampler": "{}",
    }
    more |= {"sample_seed": 0, "sampling_flops": 1.0, "evaluated_on": "own workers"}
    record = Record(**(columns | more))
    from diffscale.records.store import write_record

    write_record(run, record)
    card = (export_run(run, tmp_path / "out", "safetensors", licence="MIT") / "README.md").read_text()
    front = yaml.safe_load(card.split("---\n")[1])
    assert front["model-index"][0]["results"][0]["metrics"] == [{"type": "fid", "value": 12.5}]
    for part in ("12.5", "12 to 13", "5,000", "50,000", "64 images", "FLOPs", "| licence | MIT |", experiment.name):
        assert part in card
    assert str(tmp_path) not in card


def test_the_card_of_converted_weights_says_when_they_may_not_be_passed_on(tmp_path: Path):
    run, _, _ = make_run(tmp_path / "runs", "ddpm-cifar10")
    about = {"file": "edm.pkl", "sha256": "0" * 64, "family": "edm", "recipe": "edm-cifar10"}
    about |= {"licence": "CC BY-NC-SA 4.0", "may_be_passed_on": False}
    Path(run, "imported.json").write_text(json.dumps(about))
    card = (export_run(run, tmp_path / "out", "safetensors") / "README.md").read_text()
    assert "| licence | CC BY-NC-SA 4.0 |" in card
    assert "does not allow everyone to pass them on" in card
