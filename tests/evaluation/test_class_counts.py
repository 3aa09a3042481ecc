"""Classes are sampled as often as they occur, whatever kind the dataset is."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch import nn

from diffscale.core.errors import UserError
from diffscale.data import Dataset, open_dataset, resolve
from diffscale.data.build.build import BuildOptions, build
from diffscale.evaluation.sampling import ModelSource, draw_labels
from tests.support.tables import images, write_table

ROWS = [0] * 3 + [1] * 6 + [2] * 15  # class numbers of 24 images
COUNTS = (3, 6, 15)


def of_parquet(root):
    return write_table(root / "train.parquet", {"image": images(range(24)), "label": ROWS})


def of_arrow(root):
    table = pq.read_table(of_parquet(root))
    (root / "train.parquet").unlink()
    with pa.OSFile(str(root / "train.arrow"), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=5)
    return root


def of_build(layout):
    def make(root):
        options = BuildOptions(str(of_parquet(root)), str(root / "out"), (16,), workers=0, layout=layout)
        return build(options, show=False)[0]

    return make


def of_several_shards(root):
    options = BuildOptions(str(of_parquet(root)), str(root / "out"), (16,), workers=0, shard_bytes=4000)
    return build(options, show=False)[0]


def of_latents(root):
    np.savez(root / "a.npz", latents=np.zeros((24, 4, 8, 8), np.float32), labels=ROWS)
    return build(BuildOptions(str(root / "a.npz"), str(root / "out"), (), workers=0), show=False)[0]


KINDS = {
    "parquet": of_parquet,
    "arrow": of_arrow,
    "pixels": of_build("pixels"),
    "encoded": of_build("encoded"),
    "several shards": of_several_shards,
    "latents": of_latents,
}


def opened(place, root) -> Dataset:
    return open_dataset(resolve(str(place), None, str(root)))


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_dataset_knows_how_often_its_classes_occur(tmp_path, kind):
    dataset = opened(KINDS[kind](tmp_path), tmp_path)
    labels = dataset.gather(np.arange(dataset.n))[1]
    assert dataset.class_counts == tuple(torch.bincount(labels, minlength=3).tolist())
    assert dataset.class_counts == COUNTS
    assert dataset.split.class_counts in (None, list(COUNTS))  # a build notes them in the manifest


@pytest.mark.parametrize("kind", KINDS)
def test_samples_have_the_classes_of_the_training_images(tmp_path, kind, sampling, diffusion):
    """A run on a folder of Hugging Face sampled the last class alone, so that each of its FIDs was of one class."""
    model = nn.Linear(1, 1)
    model.num_classes = 3
    dataset = opened(KINDS[kind](tmp_path), tmp_path)
    source = ModelSource.of(model, diffusion, sampling, dataset, n=3000)
    drawn = draw_labels("train", 0, torch.arange(3000), source.class_counts)
    shares = torch.bincount(drawn, minlength=3) / 3000
    torch.testing.assert_close(shares, torch.tensor(dataset.class_counts) / dataset.n, rtol=0, atol=0.03)


def test_data_without_classes_has_no_counts(tmp_path):
    file = write_table(tmp_path / "train.parquet", {"image": images(range(24))})
    assert opened(file, tmp_path).class_counts == ()
    options = BuildOptions(str(file), str(tmp_path / "out"), (16,), workers=0)
    assert opened(build(options, show=False)[0], tmp_path).class_counts == ()


@pytest.mark.parametrize("policy", ["train", "uniform", "balanced"])
def test_a_class_without_training_images_is_not_sampled(policy):
    labels = draw_labels(policy, 0, torch.arange(3000), (0, 10, 0, 10, 0))
    assert set(labels.tolist()) == {1, 3}
    torch.testing.assert_close((labels == 1).double().mean().item(), 0.5, rtol=0, atol=0.03)


def test_a_chosen_class_without_training_images_is_refused():
    with pytest.raises(UserError, match="has training images"):
        draw_labels("2", 0, torch.arange(4), (0, 10, 0, 10))
