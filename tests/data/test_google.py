"""Datasets in gs://, through pyarrow's own client and a server that speaks Google's API on loopback."""

from __future__ import annotations

import time

import numpy as np
import pytest

from diffscale.core import storage
from diffscale.core.errors import UserError
from diffscale.data import Loader, ShardCache, ShardError, open_dataset, resolve
from diffscale.data.build.build import BuildOptions, build
from diffscale.data.format.checksums import verify_dataset
from tests.support.datasets import pictures, png, write_dataset

emulator = pytest.importorskip("gcp_storage_emulator.server", reason="gcp-storage-emulator is not installed")
IMAGES = pictures(60)


@pytest.fixture
def bucket(monkeypatch):
    server = emulator.create_server("127.0.0.1", 0, in_memory=True, default_bucket="bucket")
    server.start()
    port = server._api._httpd.server_address[1]
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{port}")
    yield "gs://bucket"
    server.stop()


def test_a_dataset_in_google_cloud_storage_is_read_checked_and_cached(bucket, tmp_path):
    write_dataset(f"{bucket}/data", IMAGES)
    assert verify_dataset(f"{bucket}/data") == []
    dataset = open_dataset(resolve(f"{bucket}/data", 8, "/unused"), cache=ShardCache(str(tmp_path / "cache")))
    assert np.array_equal(dataset.gather(np.arange(60))[0].numpy(), IMAGES)
    with Loader(dataset, seed=0, global_batch=20, stop=60) as loader:
        assert sum(len(batch) for batch in loader) == 60
    storage.write_bytes(f"{bucket}/data/train-00001.arrow", b"short")
    with pytest.raises(ShardError, match=r"gs://bucket/data/train-00001\.arrow"):
        open_dataset(f"{bucket}/data")


def test_a_dataset_is_built_from_and_into_a_bucket(bucket, tmp_path):
    """Objects have no folders: the classes are in their names alone."""
    for i, image in enumerate(IMAGES):
        storage.write_bytes(f"{bucket}/images/{'abc'[i % 3]}/{i:02d}.png", png(image))
    build(BuildOptions(f"{bucket}/images", f"{bucket}/built", (8,), workers=0), show=False)
    assert verify_dataset(f"{bucket}/built") == []
    dataset = open_dataset(f"{bucket}/built", cache=ShardCache(str(tmp_path / "cache")))
    pixels, labels = dataset.gather(np.arange(dataset.n))
    found = {x.tobytes(): int(y) for x, y in zip(pixels.numpy(), labels, strict=True)}
    assert found == {x.tobytes(): i % 3 for i, x in enumerate(IMAGES)}
    assert dataset.class_names == ["a", "b", "c"]


def test_a_server_that_does_not_answer_is_given_up_with_a_clear_error(monkeypatch):
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", "http://127.0.0.1:9")
    monkeypatch.setattr(storage, "GCS_PATIENCE", storage.timedelta(seconds=1))
    before = time.monotonic()
    with pytest.raises(OSError, match="google::cloud::Status") as error:
        open_dataset("gs://bucket/data")
    assert time.monotonic() - before < 30
    message = storage.unreachable(error.value)
    assert isinstance(message, UserError)
    assert "credentials" in message.text()


def test_an_unknown_scheme_is_refused():
    with pytest.raises(UserError, match="gs://bucket/folder"):
        storage.check_absolute("hdfs://host/data", "data.path")
