"""A checkpoint that a stranger made: its list of files cannot reach outside of its folder."""

from __future__ import annotations

import json
import pickle

import pytest

from diffscale.core.errors import UserError
from diffscale.core.hashing import digest_of
from diffscale.training.checkpoint import layout as checkpoints
from diffscale.training.checkpoint.tensors import CheckpointDamaged


@pytest.mark.parametrize(
    "name", ["../../victim", "/tmp/victim", "a/../../../victim", "", ".", "s3://bucket/x", "a\\..\\b", "a\0b"]
)
def test_a_list_of_files_that_names_another_place_is_damaged(tmp_path, name):
    """Rotation deletes what the list names."""
    run = tmp_path / "run"
    place = checkpoints.folder_of(str(run), 64)
    (run / "checkpoints" / "images-000000064").mkdir(parents=True)
    victim = tmp_path / "run" / "victim"
    victim.write_text("precious")
    mark = run / "checkpoints" / "images-000000064" / "COMPLETE"
    mark.write_text(json.dumps({"format": checkpoints.FORMAT, "files": {name: ["0" * 64, 8]}}))
    with pytest.raises(CheckpointDamaged):
        checkpoints.files_of(place)
    checkpoints.rotate(str(run), checkpoints.RetentionPolicy(set(), set(), False))
    assert victim.read_text() == "precious"


def test_a_pickle_in_the_place_of_weights_is_refused(tmp_path, trap):
    place = checkpoints.folder_of(str(tmp_path), 64)
    folder = tmp_path / "checkpoints" / "images-000000064"
    folder.mkdir(parents=True)
    for name in ("model.safetensors", "state.json", "experiment.yaml"):
        (folder / name).write_bytes(pickle.dumps(trap))
    checkpoints.complete(place, {p.name: digest_of(str(p)) for p in folder.iterdir()})
    with pytest.raises(UserError):
        checkpoints.load_for_sampling(place, "none")
