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

from diffscale.config.factory import build_diffusion, build_model, build_solver, open_training_data
from diffscale.config.load import load_tree, merge, validate
from diffscale.core.errors import UserError
from diffscale.core.hashing import digest_of
from diffscale.diffusion import sample
from diffscale.interchange.export import export_run
from diffscale.interchange.import_run import import_run
from diffscale.models.cost import count_cost
from diffscale.records.schema import Record
from diffscale.training.checkpoint import layout as ck
from diffscale.training.checkpoint.tensors import write_group
from diffscale.training.parallel import World
from diffscale.training.record_columns import record_columns

SMALL = {"model_channels": 128, "channel_mult": [1, 2], "num_blocks": 1, "attn_resolutions": [4], "dropout": 0}
PROCESSES: dict[str, dict[str, Any]] = {
    "ddpm": {"recipe": "ddpm-cifar10", "eval": {"solver": {"steps": 8}}},
    "iddpm": {"recipe": "adm-imagenet64", "data": {"class_conditional": False}, "eval": {"solver": {"steps": 8}}},
    "adm": {"recipe": "adm-imagenet64", "eval": {"solver": {"steps": 8}}},
}


def make_run(folder: Path, recipe: str, **changes: Any) -> tuple[str, nn.Module, Any]:
    """A run with random weights, as training leaves it. Returns its folder, network and settings."""
    tree = merge(
        load_tree(recipe), {"storage": str(folder), "model": SMALL, "train": {"images": 64, "precision": "fp32"}}
    )
    tree = merge(tree, {"data": {"path": "builtin:emoji", "resolution": 8}, "eval": {"ema": "none"}})
    experiment = validate(merge(tree, changes))
    dataset = open_training_data(experiment)
    torch.manual_seed(0)
    model = build_model(experiment, dataset).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
    classes = experiment.num_classes(dataset)
    cost = count_cost(lambda: build_model(experiment, dataset), 8, 3, classes)
    columns = record_columns(experiment, dataset, cost, World(), 64, 1.0, None, None, "fp32", 1)
    run = experiment.run_folder(dataset.content_hash)
    checkpoint = ck.folder_of(run, 64)
    files = write_group(checkpoint, "model", model.state_dict(), {}, 0, 1)
    shape = {"resolution": 8, "channels": 3, "num_classes": classes}
    state = {"images_seen": 64, "record": columns, "data": shape}
    for name, data in (("state.json", json.dumps(state).encode()), ("experiment.yaml", ck.save_settings(experiment))):
        Path(checkpoint, name).write_bytes(data)
        files[name] = digest_of(str(Path(checkpoint, name)))
    ck.complete(checkpoint, files)
    return run, model, experiment


def ours(model: nn.Module, experiment: Any, seed: int, label: Tensor | None) -> Tensor:
    """Images of the run, from the noise that diffusers' pipelines draw with a generator of this seed."""
    generator = torch.Generator().manual_seed(seed)
    shape = (2, 3, 8, 8)
    start = torch.randn(shape, generator=generator)
    diffusion = build_diffusion(experiment, open_training_data(experiment))
    images = sample(
        diffusion,
        model,
        start,
        solver=build_solver(experiment),
        label=label,
        noise_fn=lambda step: torch.randn(shape, generator=generator),
    )
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


@pytest.mark.parametrize(
    ("recipe", "changes", "said"),
    [
        ("edm-cifar10", {}, "model."),
        ("ddpm-cifar10", {"model": {"noise_input": "ddpm"}}, "model.noise_input"),
        ("ddpm-cifar10", {"model": {"model_channels": 32}}, "model.channel_mult"),
        ("ddpm-cifar10", {"diffusion": {"schedule": "simple_cosine", "discrete": False}}, "diffusion.schedule.name"),
    ],
)
def test_what_diffusers_cannot_compute_is_refused_and_nothing_is_written(
    recipe: str, changes: dict[str, Any], said: str, tmp_path: Path
):
    if "schedule" in changes.get("diffusion", {}):
        changes = changes | {"eval": {"solver": {"grid": "uniform_t"}}}
    run, _, _ = make_run(tmp_path / "runs", recipe, **changes)
    with pytest.raises(UserError) as caught:
        export_run(run, tmp_path / "out", "diffusers")
    assert said in caught.value.setting
    assert "--to safetensors" in caught.value.text()
    assert not (tmp_path / "out").exists()


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
