"""Damaged dataset folders and checkpoints: clean errors. Checksums are made to fit, as someone with intent would."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from hypothesis import strategies as st

from diffscale.config import load as cli
from diffscale.core.hashing import digest_of
from diffscale.models import create_model
from diffscale.training.checkpoint import layout as checkpoints
from diffscale.training.checkpoint.tensors import write_group
from tests.support.crafted import arrow_file, crafted, make_dataset, pixels_batch, read_everything

from .mutate import damaged_bytes, damaged_tree, fuzz, fuzz_apart


@pytest.fixture
def dataset(tmp_path) -> Path:
    return Path(make_dataset(tmp_path / "data", crafted(tmp_path / "data", arrow_file(pixels_batch()))))


def test_manifests_with_damaged_bytes(dataset):
    file = dataset / "manifest.json"

    def read(data: bytes) -> None:
        file.write_bytes(data)
        read_everything(str(dataset))

    fuzz(damaged_bytes(file.read_bytes()), read)


def test_manifests_with_wrong_values(dataset):
    file = dataset / "manifest.json"

    def read(tree: object) -> None:
        file.write_text(json.dumps(tree))
        read_everything(str(dataset))

    fuzz(damaged_tree(json.loads(file.read_text())), read)


def test_shards_with_damaged_bytes_whose_checksums_fit(tmp_path):
    folder = tmp_path / "data"

    def read(data: bytes) -> None:
        if not data:
            return  # a manifest cannot name an empty file
        read_everything(make_dataset(folder, crafted(folder, data)))

    fuzz_apart(damaged_bytes(arrow_file(pixels_batch())), read)


SHAPE = {"resolution": 8, "channels": 3, "num_classes": 0}


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run's folder with one checkpoint of a very small model."""
    small = ["model.model_channels=8", "model.channel_mult=[1]", "model.num_blocks=1", "model.attn_resolutions=[]"]
    experiment = cli.load_experiment("quickstart-unet", ["storage=/tmp/x", "data.resolution=8", *small])
    folder = tmp_path_factory.mktemp("run") / "run"
    place = checkpoints.folder_of(str(folder), 64)
    tensors = create_model("unet", **SHAPE, **experiment.model.arguments()).state_dict()
    files = {}
    for group in ("model", "ema/halflife", "optimizer/state"):
        files |= write_group(place, group, tensors, {}, 0, 1)
    (Path(place) / "experiment.yaml").write_bytes(checkpoints.save_settings(experiment))
    state = {"images_seen": 64, "data": SHAPE, "record": {}}
    (Path(place) / "state.json").write_text(json.dumps(state))
    files |= {name: digest_of(f"{place}/{name}") for name in ("experiment.yaml", "state.json")}
    checkpoints.complete(place, files)
    return folder


def load(place: str) -> None:
    """Sample as from a stranger's checkpoint."""
    checkpoints.load_for_sampling(place, "halflife")


def test_the_unharmed_checkpoint_is_loaded(run):
    load(checkpoints.list_checkpoints(str(run))[0])


FILES = ["state.json", "experiment.yaml", "model.safetensors", "ema/halflife.safetensors", "COMPLETE"]


@pytest.mark.parametrize("name", FILES)
def test_checkpoints_with_a_damaged_file_whose_checksum_fits(run, tmp_path, name):
    shutil.copytree(run, tmp_path / "run")
    place = checkpoints.list_checkpoints(str(tmp_path / "run"))[0]
    file = Path(place) / name
    files = checkpoints.files_of(place)

    def read(data: bytes) -> None:
        file.write_bytes(data)
        if name != "COMPLETE":
            checkpoints.complete(place, files | {name: digest_of(str(file))})
        load(place)

    fuzz(damaged_bytes(file.read_bytes()), read)


@pytest.mark.parametrize("name", ["state.json", "COMPLETE"])
def test_checkpoints_with_wrong_values(run, tmp_path, name):
    shutil.copytree(run, tmp_path / "run")
    place = checkpoints.list_checkpoints(str(tmp_path / "run"))[0]
    file = Path(place) / name
    files = checkpoints.files_of(place)

    def read(tree: object) -> None:
        file.write_text(json.dumps(tree))
        if name != "COMPLETE":
            checkpoints.complete(place, files | {name: digest_of(str(file))})
        load(place)

    fuzz(damaged_tree(json.loads(file.read_text())), read)


def test_folders_of_any_name_next_to_checkpoints(run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    names = st.text(st.characters(codec="ascii", exclude_characters="/\0"), min_size=1, max_size=12)

    def read(name: str) -> None:
        if name in (".", ".."):
            return
        folder = tmp_path / "run" / "checkpoints" / name
        folder.mkdir(exist_ok=True)
        (folder / "COMPLETE").write_text("{}")
        try:
            assert checkpoints.newest_good(str(tmp_path / "run"))
        finally:
            shutil.rmtree(folder)

    fuzz(names | st.builds("images-{}".format, names), read)
