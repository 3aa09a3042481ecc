"""A run on latents from end to end: built, trained, decoded, compared in pixels, sampled; and what is refused first."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from diffscale.config.factory import open_decoder, open_training_data
from diffscale.core.errors import UserError
from diffscale.data.autoencoder import Autoencoder
from diffscale.data.build.encode import EncodeOptions, encode
from diffscale.evaluation.image_sources import select_images
from diffscale.evaluation.sampling import to_uint8
from diffscale.records.store import read_records
from diffscale.training import draw_samples, evaluate_runs
from diffscale.training.checkpoint import layout as ck
from diffscale.training.checkpoint_evaluation import CheckpointEvaluator
from diffscale.training.evaluate_runs import EvaluateOptions, evaluate_run
from diffscale.training.numerics import Numerics
from diffscale.training.parallel import World
from diffscale.training.run import count
from diffscale.training.settings_check import check_settings
from diffscale.training.trainer import Trainer
from tests.support.autoencoders import save_autoencoder
from tests.support.datasets import pictures, write_dataset

from .small import BATCH, experiment

pytest.importorskip("diffusers")
FD = "fd_efficientnet_lite0"


@pytest.fixture(scope="module")
def vae(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_autoencoder(tmp_path_factory.mktemp("vae"))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, vae: Path) -> Path:
    """Images of 16 pixels, and next to them their latents of 8."""
    folder = tmp_path_factory.mktemp("pets")
    write_dataset(folder / "16", pictures(64, 16), classes=4)
    encode(str(folder / "16"), str(folder / "8"), EncodeOptions(Autoencoder.open(str(vae), "--encode")))
    return folder


def latent_run(storage: Path, folder: Path, **changes: Any):
    settings: dict[str, Any] = {
        "data": {"path": str(folder), "flip": False},
        "train": {"images": BATCH, "ema": {"power": []}},
        "eval": {
            "n_generated": 32,
            "points": [1.0],
            "grid_images": 4,
            "metrics": [FD],
            "solver": {"name": "ddim", "steps": 2, "clip": "none"},
        },
    }
    for section, values in changes.items():
        settings[section] = settings.get(section, {}) | values
    return experiment(storage, name="latents", **settings)


def test_a_run_on_latents_is_compared_in_pixels(tmp_path, data, vae, monkeypatch) -> None:
    monkeypatch.setenv("DIFFSCALE_CACHE", str(tmp_path / "cache"))
    for module in (evaluate_runs, draw_samples):
        monkeypatch.setattr(module, "connect", lambda: None)
    monkeypatch.setattr(evaluate_runs, "devices", lambda workers: (0, "cpu"))
    e = latent_run(tmp_path, data)
    dataset = check_settings(e)
    assert (dataset.channels, dataset.resolution) == (4, 8)
    folder = e.run_folder(dataset.content_hash)
    Trainer(e, folder, World(), count(e, dataset)).run()

    (record,) = read_records([folder])
    assert (record.train_resolution, record.eval_resolution, record.n_reference) == (16, 16, 64)
    assert record.decoder == f"{vae.name}@{Autoencoder.open(str(vae), '').digest[:8]}"
    assert record.sampling_flops > record.nfe * 2 * record.forward_macs
    grid = next((Path(folder) / "samples").glob("*.png"))
    assert Image.open(grid).mode == "RGB"

    (again,) = evaluate_run(folder, options=EvaluateOptions(keep=str(tmp_path / "kept")))
    assert again.value == pytest.approx(record.value, rel=1e-5)
    assert again.record_id == record.record_id
    kept = sorted(next((tmp_path / "kept").iterdir()).glob("*.png"))
    assert len(kept) == 32

    # The samples on disk are what diffusers' decoder makes of the network's latents.
    from diffusers import AutoencoderKL

    evaluator = CheckpointEvaluator(e, dataset, _diffusion(e, dataset), World(), Numerics())
    source = evaluator.evaluator.samples(
        evaluator.stored(ck.list_checkpoints(folder)[-1]).model, evaluator.diffusion, evaluator.sampling()
    )
    latents, _ = source.draw(torch.arange(source.batch))
    with torch.no_grad():
        images = AutoencoderKL.from_pretrained(vae).decode(latents[:4] / 0.18215).sample
    found = np.stack([np.asarray(Image.open(file)) for file in kept[:4]]).astype(int)
    assert np.abs(found - to_uint8(images).permute(0, 2, 3, 1).numpy()).max() <= 1


def _diffusion(e, dataset):
    from diffscale.config.factory import build_diffusion

    return build_diffusion(e, dataset)


def test_the_reference_of_a_run_on_latents_is_the_images_themselves(tmp_path, data) -> None:
    """The autoencoder's errors count as the model's, as in published values."""
    e = latent_run(tmp_path, data)
    dataset = open_training_data(e)
    evaluator = CheckpointEvaluator(e, dataset, _diffusion(e, dataset), World(), Numerics()).evaluator
    assert evaluator.dataset.content_hash == evaluator.reference_images.content_hash
    originals = evaluator.evaluate_source(select_images(evaluator.dataset, np.arange(64)))
    assert originals.measurements[0].value == pytest.approx(0, abs=1e-3)


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"eval": {"solver": {"name": "ddim", "clip": "static"}}}, "eval.solver.clip"),
    ({"data": {"flip": True}}, "--mirror"),
    ({"data": {"decoder": "/no/such/folder"}}, "no such folder"),
    ({"eval": {"eval_resolution": 32}}, "data.resolution"),
]


@pytest.mark.parametrize(("changes", "said"), REFUSED, ids=[said for _, said in REFUSED])
def test_settings_that_do_not_fit_latents_are_refused_before_anything_starts(tmp_path, data, changes, said) -> None:
    with pytest.raises(UserError) as caught:
        check_settings(latent_run(tmp_path, data, **changes))
    assert said in caught.value.text()


def test_an_autoencoder_of_other_channels_or_weights_is_refused(tmp_path, data, vae) -> None:
    other = save_autoencoder(tmp_path / "eight", channels=8)
    with pytest.raises(UserError, match="8 channels"):
        check_settings(latent_run(tmp_path, data, data={"decoder": str(other)}))
    moved = tmp_path / "moved"
    shutil.copytree(data, moved)
    shutil.copytree(vae, tmp_path / "vae")
    text = (moved / "8" / "manifest.json").read_text()
    (moved / "8" / "manifest.json").write_text(text.replace(str(vae), str(tmp_path / "vae")))
    check_settings(latent_run(tmp_path, moved))
    save_autoencoder(tmp_path / "vae", seed=1)
    with pytest.raises(UserError, match="what is there now"):
        check_settings(latent_run(tmp_path, moved))
    e = latent_run(tmp_path, moved, data={"decoder": str(tmp_path / "vae")})
    assert open_decoder(e, check_settings(e)) is not None  # named on purpose, as DiT's authors change the decoder


def test_latents_without_their_images_are_refused(tmp_path, data) -> None:
    shutil.copytree(data / "8", tmp_path / "alone" / "8")
    with pytest.raises(UserError, match="both the latents and the images"):
        check_settings(latent_run(tmp_path, tmp_path / "alone"))
    with pytest.raises(UserError, match="data build --encode wrote"):
        check_settings(latent_run(tmp_path, data / "8"))
