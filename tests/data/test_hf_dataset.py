"""Unconverted files of Hugging Face: the same images as those of `datasets`."""

from __future__ import annotations

import io
import pickle

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from diffscale.core.errors import UserError
from diffscale.data import Loader, ShardError, open_dataset, resolve
from diffscale.data.build.decode import Preparation, fit
from tests.support.datasets import pictures

datasets = pytest.importorskip("datasets", reason="extra `peers` is not installed")

SIDES = [(16, 16), (24, 16), (16, 40)]
CLASSES = ["ant", "bee", "cat"]


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """A DatasetDict of 30 train and 9 test images of several sizes, as Arrow and as Parquet."""
    root = tmp_path_factory.mktemp("hub")
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=CLASSES)})
    random = np.random.default_rng(0)
    splits = {}
    for split, n in (("train", 30), ("test", 9)):
        images = [Image.fromarray(random.integers(0, 256, (*SIDES[i % 3], 3), np.uint8)) for i in range(n)]
        rows = {"image": images, "label": [i % 3 for i in range(n)]}
        splits[split] = datasets.Dataset.from_dict(rows, features=features)
    data = datasets.DatasetDict(splits)
    data.save_to_disk(root / "arrow", num_shards={"train": 3, "test": 1})
    for split in splits:
        splits[split].to_parquet(root / "parquet" / "data" / f"{split}-00000-of-00001.parquet", batch_size=8)
    return root


@pytest.mark.parametrize("kind", ["arrow", "parquet"])
def test_images_and_labels_are_those_that_datasets_gives(hub, kind):
    peer = datasets.load_from_disk(str(hub / "arrow"))
    dataset = open_dataset(resolve(str(hub / kind), 16, "/unused"))
    assert (dataset.n, dataset.heldout.n, dataset.resolution) == (30, 9, 16)
    assert dataset.class_names == CLASSES
    assert not dataset.lossy
    rows = np.array([29, 0, 7, 7, 15])
    pixels, labels = dataset.gather(rows)
    for row, image, label in zip(rows.tolist(), pixels.numpy(), labels.tolist(), strict=True):
        assert np.array_equal(image, np.asarray(fit(peer["train"][row]["image"], 16, Preparation())))
        assert label == peer["train"][row]["label"]
    assert np.array_equal(
        dataset.heldout.gather(np.array([8]))[0][0].numpy(),
        np.asarray(fit(peer["test"][8]["image"], 16, Preparation())),
    )


@pytest.mark.parametrize("kind", ["arrow", "parquet"])
def test_it_trains_like_any_other_dataset(hub, kind):
    dataset = open_dataset(resolve(str(hub / kind), 16, "/unused"))
    assert dataset.content_hash == pickle.loads(pickle.dumps(dataset)).content_hash
    loader = Loader(dataset, seed=0, global_batch=10, stop=60, order="blocks", window=2, flip=True)
    batches = list(loader)
    loader.wait_verified()
    assert sorted(np.concatenate([b.labels.numpy() for b in batches[:3]]).tolist()) == [0] * 10 + [1] * 10 + [2] * 10
    assert batches[0].images.shape == (10, 3, 16, 16)


def test_another_resolution_is_another_dataset(hub):
    hashes = {open_dataset(resolve(str(hub / "arrow"), side, "/unused")).content_hash for side in (8, 16)}
    assert len(hashes) == 2


def test_cifar10s_own_column_names_and_grey_images_are_understood(tmp_path):
    """`cifar10` has img and label, `mnist` grey images; string labels become sorted classes."""
    grey = pictures(6, side=8, channels=1)[..., 0]
    rows = []
    for image in grey:
        out = io.BytesIO()
        Image.fromarray(image).save(out, "PNG")
        rows.append({"bytes": out.getvalue(), "path": None})
    pq.write_table(pa.table({"img": rows, "label": list("bacbac")}), tmp_path / "part.parquet", row_group_size=4)
    dataset = open_dataset(resolve(str(tmp_path), None, "/unused"))
    assert (dataset.channels, dataset.resolution, dataset.class_names) == (1, 8, ["a", "b", "c"])
    pixels, labels = dataset.gather(np.arange(6))
    assert np.array_equal(pixels.numpy()[..., 0], grey)
    assert labels.tolist() == [1, 0, 2, 1, 0, 2]


def test_a_damaged_row_and_a_replaced_file_are_named(tmp_path):
    out = io.BytesIO()
    Image.fromarray(pictures(1)[0]).save(out, "PNG")
    rows = [{"bytes": out.getvalue(), "path": None}] * 300
    rows[150] = {"bytes": out.getvalue()[:50], "path": None}
    file = tmp_path / "train.parquet"
    pq.write_table(pa.table({"image": rows}), file)
    dataset = open_dataset(resolve(str(file), 8, "/unused"))
    dataset.gather(np.arange(10))
    with pytest.raises(ShardError, match=r"train\.parquet.*\n.*\n.*row 150"):
        dataset.gather(np.arange(145, 155))
    pq.write_table(pa.table({"image": rows[:200]}), tmp_path / "new.parquet")
    (tmp_path / "new.parquet").replace(file)
    with pytest.raises(ShardError, match="replaced"):
        dataset.gather(np.arange(10))


def test_files_without_images_or_broken_ones_are_refused(tmp_path):
    pq.write_table(pa.table({"text": ["a"]}), tmp_path / "text.parquet")
    with pytest.raises(UserError, match="column of images"):
        open_dataset(resolve(str(tmp_path / "text.parquet"), 8, "/unused"))
    (tmp_path / "broken.parquet").write_bytes(b"PAR1" + bytes(100))
    with pytest.raises(UserError, match=r"broken\.parquet"):
        open_dataset(resolve(str(tmp_path / "broken.parquet"), 8, "/unused"))
