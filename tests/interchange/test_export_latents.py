"""Exported networks of latents bring the autoencoder, draw the run's images, and say whose licence it is under."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from diffscale.core.errors import UserError
from diffscale.data.autoencoder import Autoencoder
from diffscale.data.build.encode import EncodeOptions, encode
from diffscale.interchange.export import export_run
from tests.support.autoencoders import save_autoencoder
from tests.support.datasets import pictures, write_dataset
from tests.support.hub import TOKEN, Hub, Repo, connected, hub_server

from .test_export import make_run, ours

pytest.importorskip("diffusers")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub with a small autoencoder."""
    vae = save_autoencoder(tmp_path / "vae", scaling_factor=0.3, shift_factor=0.1)
    with hub_server() as served, connected(served, monkeypatch, tmp_path / "cache", TOKEN):
        served.repos["models/ada/vae"] = Repo({path.name: path.read_bytes() for path in vae.iterdir()}, licence="mit")
        yield served


@pytest.fixture
def latents(tmp_path: Path, hub: Hub) -> Path:
    """Images of 16 pixels in four classes, and their latents of 8."""
    write_dataset(tmp_path / "pets" / "16", pictures(16, 16), classes=4)
    options = EncodeOptions(Autoencoder.open("ada/vae", "--encode"))
    encode(str(tmp_path / "pets" / "16"), str(tmp_path / "pets" / "8"), options)
    return tmp_path / "pets"


FORMS: dict[str, tuple[str, dict[str, Any]]] = {
    "DiTTransformer2DModel": ("dit-b-4", {"model": {"out_channels": 8}, "eval": {"solver": {"steps": 8}}}),
    "own code": ("edm2-imagenet512-xs", {"eval": {"solver": {"steps": 4}}}),
}


def run_on(latents: Path, storage: Path, form: str) -> tuple[str, Any, Any]:
    recipe, changes = FORMS[form]
    return make_run(storage, recipe, data={"path": str(latents), "flip": False}, **changes)


@pytest.mark.parametrize("form", FORMS)
def test_a_pipeline_of_latents_draws_the_runs_images(form: str, latents: Path, tmp_path: Path):
    from diffusers import DiffusionPipeline

    run, model, experiment = run_on(latents, tmp_path / "runs", form)
    out = export_run(run, tmp_path / "out", "diffusers")
    pipeline = DiffusionPipeline.from_pretrained(out, custom_pipeline=str(out), trust_remote_code=True)
    theirs = pipeline(class_labels=[1, 2], num_inference_steps=8 if "DiT" in form else 4, generator=seeded(3))
    theirs = theirs if "DiT" in form else theirs / 2 + 0.5
    assert theirs.shape == (2, 3, 16, 16)
    torch.testing.assert_close(ours(model, experiment, 3, torch.tensor([1, 2])), theirs, rtol=0, atol=1e-4)
    assert form in (out / "README.md").read_text()


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_the_card_names_the_autoencoder_and_its_licence_decides_what_may_be_uploaded(
    latents: Path, hub: Hub, tmp_path: Path
):
    run, *_ = run_on(latents, tmp_path / "runs", "own code")
    commit = hub.repos["models/ada/vae"].sha
    card = (export_run(run, tmp_path / "out", "diffusers", push="ada/pets") / "README.md").read_text()
    assert f"| autoencoder | ada/vae, commit {commit}, in `vae/`" in card
    assert "vae/diffusion_pytorch_model.safetensors" in hub.repos["models/ada/pets"].files

    hub.repos["models/ada/vae"].licence = "cc-by-nc-4.0"
    with pytest.raises(UserError, match=r"ada/vae has the licence cc-by-nc-4\.0"):
        export_run(run, tmp_path / "refused", "diffusers", push="ada/other")
    assert not (tmp_path / "refused").exists()
    export_run(run, tmp_path / "private", "diffusers", push="ada/private", private=True)

    config = json.loads((export_run(run, tmp_path / "plain", "safetensors") / "config.json").read_text())
    assert config["latents"] == {
        "autoencoder": f"vae@{Autoencoder.open('ada/vae', '').digest[:8]}",
        "shift": [0.1] * 4,
        "scale": [0.3] * 4,
    }
