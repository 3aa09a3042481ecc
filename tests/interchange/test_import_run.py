"""A file of published weights becomes a run: drawn from, evaluated with its own settings, and begun at."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from diffscale.config.factory import open_training_data
from diffscale.config.load import load_tree, merge, validate
from diffscale.core.errors import UserError
from diffscale.interchange.import_run import FILE, import_run, imported_from
from diffscale.training.checkpoint import layout as ck
from diffscale.training.checkpoint.tensors import read_group
from diffscale.training.initial_weights import with_initial_weights
from diffscale.training.load import list_targets, load_trained, settings_of_run
from diffscale.training.run import train

from .authors import LAYOUTS, images, tensors_of

LAYOUT = LAYOUTS["torchcfm"]
NETWORK = {k: list(v) if isinstance(v, list | tuple) else v for k, v in LAYOUT["model"].items() if k != "resolution"}


def overrides(storage: Path, **changes: Any) -> list[str]:
    """The small network of the layout, on the emoji."""
    settings = {"storage": str(storage), "data.path": "builtin:emoji", "data.resolution": 16}
    settings |= {f"model.{key}": value for key, value in NETWORK.items()} | changes
    return [f"{key}={json.dumps(value)}" for key, value in settings.items()]


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """torchcfm's checkpoint: weights of two networks, and what else training keeps."""
    path = tmp_path_factory.mktemp("file") / "cfm_cifar10_weights_step_400000.pt"
    tensors = tensors_of(LAYOUT)
    net: dict[str, Tensor] = {name: torch.zeros_like(t) for name, t in tensors.items()}
    torch.save({"net_model": net, "ema_model": {f"module.{n}": t for n, t in tensors.items()}, "step": 3}, path)
    return path


@pytest.fixture(scope="module")
def run(weights: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    return import_run(weights, "torchcfm", overrides(tmp_path_factory.mktemp("storage")))


@torch.no_grad()
def test_the_run_has_the_network_of_the_file(run: str):
    (checkpoint,) = list_targets(run)
    experiment = settings_of_run(checkpoint)
    trained = load_trained(checkpoint, experiment.eval.ema, experiment)
    out = trained.model(images(LAYOUT), torch.tensor(LAYOUT["logsnr"]))[0].flatten()
    torch.testing.assert_close(out[:: out.numel() // 48][:48], torch.tensor(LAYOUT["output"]), rtol=0, atol=1e-5)
    assert (experiment.diffusion.prediction, experiment.diffusion.interpolant) == ("u", "linear")
    assert trained.columns["images_seen"] == 51_200_000
    ck.verify(checkpoint)


def test_the_run_says_where_its_weights_are_from(run: str, weights: Path):
    import hashlib

    about = imported_from(run)
    assert about is not None
    assert about["sha256"] == hashlib.sha256(weights.read_bytes()).hexdigest()
    assert (about["family"], about["licence"], about["may_be_passed_on"]) == ("torchcfm", "MIT", True)
    assert (Path(run) / FILE).exists()


def test_an_import_is_not_made_twice_and_leaves_nothing_when_it_fails(run: str, weights: Path, tmp_path: Path):
    with pytest.raises(UserError, match="without checkpoints"):
        import_run(weights, "torchcfm", overrides(tmp_path), out=run)
    out = tmp_path / "out"
    for changes, match in (
        ({"model.num_blocks": 2}, "this network"),
        ({"data.path": "???"}, r"data\.path"),
    ):
        with pytest.raises(UserError, match=match):
            import_run(weights, "torchcfm", overrides(tmp_path, **changes), out=str(out))
        assert not out.exists()
    with pytest.raises(UserError, match="torchcfm"):
        import_run(weights, "torchcfn", overrides(tmp_path))


def test_a_file_of_another_architecture_names_the_first_weight_that_does_not_fit(tmp_path: Path):
    file = tmp_path / "dit.safetensors"
    save_file(tensors_of(LAYOUTS["dit"]), file)
    with pytest.raises(UserError) as caught:
        import_run(file, "iddpm", [f"storage={tmp_path}", "data.path=builtin:emoji"])
    assert "blocks.0.adaLN_modulation.1.bias" in caught.value.text()


def test_a_networks_size_is_found_among_the_familys_recipes(tmp_path: Path):
    """The network of DiT-S/8 by its authors' names; nothing says which of the twelve it is."""
    from diffscale.interchange.containers import read_source
    from diffscale.interchange.families import family_of
    from diffscale.interchange.import_run import _fitting

    width = 384
    shapes: dict[str, tuple[int, ...]] = {
        "x_embedder.proj.weight": (width, 4, 8, 8),
        "x_embedder.proj.bias": (width,),
        "t_embedder.mlp.0.weight": (width, 256),
        "t_embedder.mlp.0.bias": (width,),
        "t_embedder.mlp.2.weight": (width, width),
        "t_embedder.mlp.2.bias": (width,),
        "y_embedder.embedding_table.weight": (1001, width),
        "final_layer.linear.weight": (512, width),
        "final_layer.linear.bias": (512,),
        "final_layer.adaLN_modulation.1.weight": (2 * width, width),
        "final_layer.adaLN_modulation.1.bias": (2 * width,),
    }
    inner = {
        "attn.qkv": (3, 1),
        "attn.proj": (1, 1),
        "mlp.fc1": (4, 1),
        "mlp.fc2": (1, 4),
        "adaLN_modulation.1": (6, 1),
    }
    for block in range(12):
        for name, (rows, columns) in inner.items():
            shapes[f"blocks.{block}.{name}.weight"] = (rows * width, columns * width)
            shapes[f"blocks.{block}.{name}.bias"] = (rows * width,)
    save_file(
        {name: torch.zeros(shape, dtype=torch.float16) for name, shape in shapes.items()}, tmp_path / "a.safetensors"
    )
    family = family_of("dit")
    choice = _fitting(family, read_source(tmp_path / "a.safetensors", family.parts), {}, None, 1000)
    assert "model.preset=dit-s-8" in choice.candidate.changes


def test_a_run_begins_at_imported_weights(run: str, tmp_path: Path):
    tree = merge(load_tree("icfm-cifar10"), {"name": "tuned", "storage": str(tmp_path), "model": NETWORK})
    tree = merge(
        tree, {"data": {"path": "builtin:emoji", "resolution": 16}, "optim": {"lr": 1e-12, "warmup_images": 0}}
    )
    tree = merge(tree, {"train": {"images": 4, "global_batch": 2, "gpu": False, "trackers": [], "init_from": run}})
    tree = merge(tree, {"eval": {"n_generated": 0}})
    experiment = validate(tree)
    dataset = open_training_data(experiment)
    resolved = with_initial_weights(experiment, dataset)
    assert resolved.train.init_weights is not None
    assert resolved.run_id("d") != experiment.run_id("d")
    result = train(experiment, show=False, here=True)
    assert result.finished
    newest = ck.list_checkpoints(result.run_folder)[-1]
    (source,) = list_targets(run)
    begun, imported = read_group(newest, "model"), read_group(source, "model")
    averaged = read_group(newest, "ema/halflife")
    for name, tensor in imported.items():
        torch.testing.assert_close(begun[name], tensor, rtol=0, atol=1e-9)
        torch.testing.assert_close(averaged[name], tensor, rtol=0, atol=1e-6)

    other = merge(tree, {"data": {"class_conditional": True}})
    with pytest.raises(UserError) as caught:
        with_initial_weights(validate(other), dataset)
    assert 'train.init_skip=["embed_label.weight"]' in caught.value.text()
    told = merge(other, {"train": {"init_skip": ["embed_label.*"]}})
    assert with_initial_weights(validate(told), dataset).train.init_weights == resolved.train.init_weights
    with pytest.raises(UserError, match=r"init_from"):
        with_initial_weights(validate(merge(tree, {"train": {"init_from": str(tmp_path / "none")}})), dataset)
