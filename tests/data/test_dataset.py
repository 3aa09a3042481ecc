from __future__ import annotations

import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from diffscale.core.errors import UserError
from diffscale.data import ShardError, open_dataset
from diffscale.data.format.checksums import verify_dataset
from diffscale.data.format.manifest import ContentHash
from tests.support.datasets import damage, pictures, write_dataset


@pytest.mark.parametrize("shards", [1, 3, 50])
def test_gathered_rows_are_those_that_were_stored(tmp_path, images, shards):
    write_dataset(tmp_path, images, shards)
    dataset = open_dataset(str(tmp_path))
    rows = np.array([99, 0, 50, 50, 33, 34, 1])
    pixels, labels = dataset.gather(rows)
    assert pixels.is_contiguous()
    assert np.array_equal(pixels.numpy(), images[rows])
    assert labels.tolist() == (rows % 4).tolist()
    few = np.arange(0, 100, 40)  # fewer rows than shards
    assert np.array_equal(dataset.gather(few)[0].numpy(), images[few])


def test_rows_outside_are_refused(dataset):
    for rows in ([-1], [100], [0, 100]):
        with pytest.raises(IndexError):
            dataset.gather(np.array(rows))


def test_a_dataset_can_be_sent_to_a_worker(dataset):
    there = pickle.loads(pickle.dumps(dataset))
    assert there.content_hash == dataset.content_hash
    assert torch.equal(there.gather(np.arange(5))[0], dataset.gather(np.arange(5))[0])


def test_the_content_hash_is_of_the_rows_and_not_of_how_they_are_divided(tmp_path, images):
    hashes = set()
    for shards in (1, 3, 7):
        write_dataset(tmp_path / str(shards), images, shards)
        hashes.add(open_dataset(str(tmp_path / str(shards))).content_hash)
    assert len(hashes) == 1
    swapped = images[[1, 0, *range(2, 100)]]
    brighter = images.copy()
    brighter[7, 0, 0, 0] ^= 1
    for i, other in enumerate((swapped, brighter, images[:99])):
        write_dataset(tmp_path / f"other{i}", other)
        hashes.add(open_dataset(str(tmp_path / f"other{i}")).content_hash)
    assert len(hashes) == 4


def test_hashes_of_runs_of_rows_can_be_joined():
    rows = [(bytes([i]) * 5, i % 3) for i in range(20)]

    def over(some):
        total = ContentHash()
        for image, label in some:
            total.add(image, label)
        return total

    assert over(rows[:7]).join(over(rows[7:])).hex() == over(rows).hex()


@pytest.mark.parametrize("how", ["truncated", "missing"])
def test_a_missing_or_truncated_shard_is_named_when_the_dataset_is_opened(dataset, how):
    damage(dataset.local_path(1), how)
    with pytest.raises(ShardError, match=r"train-00001\.arrow") as error:
        open_dataset(dataset.path)
    assert error.value.shard.endswith("train-00001.arrow")


def test_a_flipped_byte_is_found_by_verify_which_names_the_shard(dataset):
    assert verify_dataset(dataset.path) == []
    damage(dataset.local_path(1), "flipped")
    (problem,) = verify_dataset(dataset.path)
    assert "train-00001.arrow" in problem
    assert "SHA-256" in problem


@pytest.mark.parametrize("how", ["truncated", "flipped", "missing", "replaced"])
def test_a_shard_that_changes_while_training_is_an_error_and_never_wrong_pixels(dataset, images, how):
    rows = np.arange(100)
    dataset.gather(rows)
    path = dataset.local_path(1)
    if how == "replaced":
        shutil.copy(dataset.local_path(0), path + ".new")
        os.replace(path + ".new", path)
    else:
        damage(path, how)
    with pytest.raises(ShardError, match=r"train-00001\.arrow"):
        dataset.gather(rows)
    start, end = int(dataset.starts[1]), int(dataset.starts[2])
    rest = np.r_[0:start, end:100]
    assert np.array_equal(dataset.gather(rest)[0].numpy(), images[rest])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m["splits"]["train"]["shards"][0].update(rows=1), "sum"),
        (lambda m: m["splits"]["train"]["shards"].pop(), "sum"),
        (lambda m: m.update(resolution=16), "content_hash"),
        (lambda m: m.update(version=2), "version"),
        (lambda m: m.update(extra=1), "extra"),
        (lambda m: m["splits"]["train"]["shards"][0].update(file="../../secret.arrow"), "file"),
    ],
)
def test_a_manifest_that_does_not_match_is_refused(dataset, change, message):
    path = Path(dataset.path) / "manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=message):
        open_dataset(dataset.path)


def test_a_shard_of_another_dataset_is_found_although_its_size_and_shape_fit(tmp_path, images):
    write_dataset(tmp_path / "a", images, 1)
    write_dataset(tmp_path / "b", pictures(100, seed=1), 1)
    shutil.copy(tmp_path / "b" / "train-00000.arrow", tmp_path / "a" / "train-00000.arrow")
    assert any("SHA-256" in problem for problem in verify_dataset(str(tmp_path / "a")))


def test_a_folder_without_a_dataset_says_what_to_do(tmp_path):
    with pytest.raises(UserError, match=r"diffscale\.data build"):
        open_dataset(str(tmp_path))
    with pytest.raises(UserError, match="absolute"):
        open_dataset("some/folder")


def test_the_held_out_split_is_refused_where_there_is_none(dataset):
    assert dataset.heldout is None
    with pytest.raises(UserError, match="--split"):
        open_dataset(dataset.path, "heldout")


TOUCH = """
import os, sys
import numpy as np
from diffscale.data import open_dataset
dataset = open_dataset(sys.argv[1])
dataset.gather(np.arange(dataset.n))
os.truncate(dataset.local_path(1), 100)
print(dataset.shard(1).images.sum())
"""


def test_after_a_worker_died_of_a_truncated_shard_opening_the_dataset_names_it(tmp_path):
    """A mapped file that is truncated between the check and the copy is a SIGBUS, which no code can catch."""
    write_dataset(tmp_path / "large", pictures(300, side=64))
    worker = subprocess.run([sys.executable, "-c", TOUCH, str(tmp_path / "large")], capture_output=True, timeout=120)
    assert worker.returncode == -signal.SIGBUS
    with pytest.raises(ShardError, match=r"train-00001\.arrow.*\n.*\n.*100 bytes"):
        open_dataset(str(tmp_path / "large"))


def test_rows_are_the_same_without_a_compiler(dataset, monkeypatch):
    rows = np.random.default_rng(0).integers(0, dataset.n, 200)
    pixels, labels = dataset.gather(rows)
    monkeypatch.setattr("diffscale.kernels.compile.library", lambda name: None)
    again, labels_again = dataset.gather(rows)
    assert torch.equal(again, pixels)
    assert torch.equal(labels_again, labels)


def test_at_most_a_bounded_number_of_shards_is_mapped(tmp_path, images, monkeypatch):
    """Each shard stayed mapped for ever: 370,000 shards exceed the 65,530 maps that Linux allows a process."""
    monkeypatch.setattr("diffscale.data.format.dataset.MOST_MAPPED", 4)
    write_dataset(tmp_path, images, shards=20)
    dataset = open_dataset(str(tmp_path))
    for rows in (range(100), range(99, -1, -1), range(50)):  # the first two need more shards at once than stay mapped
        assert np.array_equal(dataset.gather(np.array(rows))[0].numpy(), images[rows])
    maps = [line for line in Path("/proc/self/maps").read_text().splitlines() if str(tmp_path) in line]
    assert len(maps) == 4


def test_counts_of_classes_come_from_the_manifest_and_are_checked(dataset, monkeypatch):
    file = Path(dataset.path) / "manifest.json"
    manifest = json.loads(file.read_text())
    for counts, problem in (([25, 25, 25], "class_counts"), ([26, 25, 25, 25], "class_counts"), ([100, 0, 0, 0], None)):
        manifest["splits"]["train"]["class_counts"] = counts
        file.write_text(json.dumps(manifest))
        if problem:
            with pytest.raises(UserError, match=problem):
                open_dataset(dataset.path)
    opened = open_dataset(dataset.path)
    monkeypatch.setattr(opened, "shard", lambda s: pytest.fail("a label was read"))
    assert opened.class_counts == (100, 0, 0, 0)
    assert any("class_counts" in line for line in verify_dataset(dataset.path))
