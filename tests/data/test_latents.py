"""`data build --encode`: pixels and their latents by diffusers' own autoencoder, drawn anew in each epoch."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from diffscale.core.errors import UserError
from diffscale.data import Dataset, Loader, open_dataset
from diffscale.data.autoencoder import Autoencoder
from diffscale.data.build import encode as encoding
from diffscale.data.build.encode import EncodeOptions, encode
from diffscale.data.format.checksums import verify_dataset
from diffscale.data.format.manifest import read_manifest
from diffscale.data.loading.augment import is_mirrored
from tests.support.autoencoders import save_autoencoder
from tests.support.commands import run_command
from tests.support.datasets import pictures, write_dataset
from tests.support.hub import Hub, Repo, connected, hub_server

pytest.importorskip("diffusers")
SIDE, ROWS = 16, 24


@pytest.fixture(scope="module")
def vae(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_autoencoder(tmp_path_factory.mktemp("vae"), scaling_factor=0.25, shift_factor=0.5)


@pytest.fixture
def pixels(tmp_path: Path) -> Path:
    write_dataset(tmp_path / "pets" / "16", pictures(ROWS, SIDE))
    return tmp_path / "pets" / "16"


def encoded(pixels: Path, vae: Path, **options: object) -> Dataset:
    autoencoder = Autoencoder.open(str(vae), "--encode")
    target = str(pixels.with_name("8"))
    return open_dataset(encode(str(pixels), target, EncodeOptions(autoencoder, **options)))  # type: ignore[arg-type]


def posterior(vae: Path, images: torch.Tensor):
    """What diffusers itself says of images (B, H, W, 3) uint8."""
    from diffusers import AutoencoderKL

    network = AutoencoderKL.from_pretrained(vae)
    with torch.no_grad():
        return network.encode(images.permute(0, 3, 1, 2).float() / 127.5 - 1).latent_dist


@pytest.mark.parametrize(
    ("scale", "shift", "factor"),
    [
        ("sd", [0.5] * 4, [0.25] * 4),  # shift_factor and scaling_factor of its config
        ("edm2", [5.81, 3.25, 0.12, -2.15], [0.5 / 4.17, 0.5 / 4.62, 0.5 / 3.71, 0.5 / 3.28]),  # edm2 encoders.py:81-91
    ],
)
def test_rows_are_mean_and_deviation_of_diffusers_posterior(pixels, vae, scale, shift, factor) -> None:
    dataset = encoded(pixels, vae, scale=scale)
    assert (dataset.channels, dataset.resolution, dataset.image_resolution, dataset.n) == (4, 8, 16, ROWS)
    rows = np.arange(ROWS)
    images, labels = open_dataset(str(pixels)).gather(rows)
    stored, same = dataset.gather(rows)
    dist = posterior(vae, images)
    by_channel = [torch.tensor(v)[:, None, None] for v in (shift, factor)]
    mean, std = (dist.mean - by_channel[0]) * by_channel[1], dist.std * by_channel[1]
    torch.testing.assert_close(stored, torch.cat([mean, std], 1), rtol=1e-4, atol=1e-5)
    assert torch.equal(labels, same)
    assert dataset.name(5) == "image 5"
    np.testing.assert_allclose(dataset.mean, mean.mean((0, 2, 3)), rtol=1e-4, atol=1e-5)
    spread = (mean.var((0, 2, 3), correction=0) + std.square().mean((0, 2, 3))).sqrt()
    np.testing.assert_allclose(dataset.std, spread, rtol=1e-4)
    assert verify_dataset(str(pixels.parent)) == []


def test_a_latent_is_drawn_by_position_so_that_epochs_differ_and_workers_agree(pixels, vae) -> None:
    dataset = encoded(pixels, vae)

    def drawn(start: int, shard: tuple[int, int] | None = None) -> torch.Tensor:
        with Loader(dataset, seed=3, global_batch=ROWS, start=start, stop=start + ROWS, shard=shard) as loader:
            return next(iter(loader)).images

    first, again, later = drawn(0), drawn(0), drawn(ROWS)
    assert torch.equal(first, again)
    assert torch.equal(first[4:10], drawn(0, (4, 10)))
    stored = dataset.gather(np.arange(ROWS))[0]
    (mean, std), order = stored.chunk(2, 1), lambda x: x.flatten(1).sum(1).argsort()
    assert first.shape == mean.shape
    assert not torch.equal(first[order(first)], later[order(later)])
    noise = (first.double().mean((0, 2, 3)) - mean.double().mean((0, 2, 3))) / std.mean((0, 2, 3))
    assert noise.abs().max() < 5 / (ROWS * 64) ** 0.5  # standard errors of the mean of unit noise


def test_a_mirrored_image_has_its_own_latent(pixels, vae) -> None:
    plain = encoded(pixels, vae)
    with pytest.raises(UserError, match="--mirror"):
        Loader(plain, seed=0, global_batch=4, flip=True)
    shutil.rmtree(pixels.with_name("8"))
    both = encoded(pixels, vae, mirror=True)
    stored = both.gather(np.arange(ROWS))[0]
    images = open_dataset(str(pixels)).gather(np.arange(ROWS))[0]
    other = posterior(vae, images.flip(2))
    torch.testing.assert_close(stored[:, 8:12], (other.mean - 0.5) * 0.25, rtol=1e-4, atol=1e-5)
    with Loader(both, seed=0, global_batch=ROWS, stop=ROWS, flip=True) as loader:
        batch = next(iter(loader))
    mirrored = is_mirrored(0, batch.positions)
    assert 0 < int(mirrored.sum()) < ROWS
    nearest = torch.cdist(batch.images.flatten(1), torch.cat([stored[:, :4], stored[:, 8:12]]).flatten(1)).argmin(1)
    close = (nearest >= ROWS) == mirrored
    assert close.float().mean() > 0.7  # random weights: the noise is as large as the difference between images


def test_an_interrupted_encoding_continues_at_its_shard(pixels, vae, monkeypatch) -> None:
    options = EncodeOptions(Autoencoder.open(str(vae), "--encode"))
    target, calls = str(pixels.with_name("8")), []
    real = encoding.write_shard

    def failing(folder: str, file: str, batch):
        calls.append(file)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(folder, file, batch)

    monkeypatch.setattr(encoding, "write_shard", failing)
    with pytest.raises(KeyboardInterrupt):
        encode(str(pixels), target, options)
    with pytest.raises(UserError, match="others"):
        encode(str(pixels), target, EncodeOptions(options.autoencoder, "edm2"))
    encode(str(pixels), target, options)
    assert calls == ["train-00000.arrow", "train-00001.arrow", "train-00001.arrow", "train-00002.arrow"]
    encode(str(pixels), target, options)
    assert len(calls) == 4
    assert sorted(p.name for p in Path(target).iterdir()) == ["manifest.json", *sorted(set(calls))]


def test_the_command_builds_pixels_and_latents(tmp_path, vae) -> None:
    np.savez(tmp_path / "pets.npz", images=pictures(8, SIDE), labels=np.arange(8) % 2)
    build = ("build", str(tmp_path / "pets.npz"), str(tmp_path / "out"), "--encode", str(vae), "--workers", "0")
    plan = run_command("data", *build, "--resolution", "16", "--dry-run")
    assert plan.code == 0
    assert "4 x 8 x 8 of each image" in plan.out
    assert not (tmp_path / "out").exists()
    ended = run_command("data", *build, "--resolution", "16", "--split", "0.3")
    assert ended.code == 0, ended.err
    made = read_manifest(str(tmp_path / "out" / "8"))
    assert made.encoding is not None
    assert made.encoding.images == read_manifest(str(tmp_path / "out" / "16")).content_hash
    assert set(made.splits) == {"train", "heldout"}
    assert "encoded" in run_command("data", "inspect", str(tmp_path / "out"), "--grid", str(tmp_path / "g.png")).out


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--resolution", "15"), "a multiple of 2"),
        (("--resolution", "16", "--resolution", "8"), "one resolution"),
        (("--resolution", "16", "--channels", "1"), "--channels"),
    ],
)
def test_images_that_the_autoencoder_cannot_take_are_refused_before_anything_is_written(tmp_path, vae, more, said):
    np.savez(tmp_path / "pets.npz", images=pictures(8, SIDE))
    ended = run_command("data", "build", str(tmp_path / "pets.npz"), str(tmp_path / "out"), "--encode", str(vae), *more)
    assert ended.code == 2
    assert said in ended.err
    assert not (tmp_path / "out").exists()


def test_a_place_without_an_autoencoder_is_named(tmp_path, vae) -> None:
    def reason(place: Path | str) -> str:
        with pytest.raises(UserError) as caught:
            Autoencoder.open(str(place), "--encode")
        return caught.value.text()

    assert "no config.json" in reason(tmp_path)
    assert "no such folder" in reason(tmp_path / "missing")
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "UNet2DModel"}))
    assert "UNet2DModel" in reason(tmp_path)
    shutil.copy(vae / "config.json", tmp_path / "config.json")
    (tmp_path / "diffusion_pytorch_model.bin").write_bytes(b"a pickle")
    assert "pickled weights are not opened" in reason(tmp_path)
    (tmp_path / "diffusion_pytorch_model.safetensors").write_bytes(b"\x00" * 100)
    with pytest.raises(UserError, match="undamaged"):
        _ = Autoencoder.open(str(tmp_path), "--encode").network


@pytest.fixture
def hub(tmp_path: Path, vae: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    files = {path.name: path.read_bytes() for path in vae.iterdir()}
    with hub_server() as served, connected(served, monkeypatch, tmp_path / "hub"):
        served.repos = {
            "models/ada/vae": Repo(files),
            "models/ada/pipeline": Repo(
                {f"vae/{name}": data for name, data in files.items()} | {"model_index.json": b""}
            ),
            "models/ada/gated": Repo(files, gated=True),
            "models/ada/pickled": Repo({"config.json": files["config.json"], "diffusion_pytorch_model.bin": b""}),
            "models/ada/unet": Repo(files | {"config.json": json.dumps({"_class_name": "UNet2DModel"}).encode()}),
        }
        yield served


def test_an_autoencoder_of_the_hub_is_fetched_once_and_pinned(hub: Hub, vae: Path) -> None:
    local = Autoencoder.open(str(vae), "--encode")
    for place, repo in (("ada/vae@v1", "ada/vae"), ("hf://ada/pipeline", "ada/pipeline")):
        found = Autoencoder.open(place, "--encode")
        assert (found.name, found.revision) == (repo, hub.repos[f"models/{repo}"].sha)
        assert found.digest == local.digest
    asked = len(hub.asked)
    again = Autoencoder.open(f"{found.name}@{found.revision}", "data.decoder")  # as a manifest names it
    assert again.folder == found.folder
    assert not any(method == "GET" and "/resolve/" in path for method, path in hub.asked[asked:])


@pytest.mark.parametrize(
    ("place", "said"),
    [
        ("ada/gated", "accept its terms"),
        ("ada/nothing", "nothing is at the path ada/nothing; read as a name on the hub: it does not exist"),
        ("ada/vae@gone", "no such revision"),
        ("ada/pickled", "pickled weights are not opened"),
        ("ada/unet", "UNet2DModel"),
        ("./ada/vae", "no such folder"),
    ],
)
def test_an_autoencoder_that_the_hub_cannot_give_is_explained_before_any_work(
    place: str, said: str, hub: Hub, tmp_path: Path
) -> None:
    np.savez(tmp_path / "pets.npz", images=pictures(8, SIDE))
    build = ("build", str(tmp_path / "pets.npz"), str(tmp_path / "out"), "--resolution", "16", "--encode", place)
    ended = run_command("data", *build)
    assert ended.code == 2
    assert f"--encode = {place!r}" in ended.err
    assert said in ended.err
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / ".out.build").exists()


def test_a_hub_that_cannot_be_reached_is_said(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(UserError, match="no network"):
        Autoencoder.open("ada/vae", "--encode")
