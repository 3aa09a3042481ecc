"""Builds from every kind of source; those about the cluster with real Ray Data on two CPUs, the others in-process."""

from __future__ import annotations

import csv
import gzip
import io
import os
import pickle
import signal
import subprocess
import sys
import tarfile
import time
import zipfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from diffscale.core.errors import UserError
from diffscale.data import open_dataset, resolve
from diffscale.data.build.build import BuildOptions, build
from diffscale.data.build.decode import Preparation
from diffscale.data.format.checksums import verify_dataset
from diffscale.data.format.manifest import read_manifest
from tests.support.datasets import pictures, png
from tests.support.sources import CLASSES, IMAGES, SOURCES, add_file, image_name, make_folder, make_npz, make_tar


@pytest.fixture(scope="module")
def ray_on_two_cpus():
    os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    import ray

    if not ray.is_initialized():
        ray.init(address="local", num_cpus=2, object_store_memory=100_000_000, include_dashboard=False)
    yield
    ray.shutdown()


EIGHT_IMAGES = 8 * 16 * 16 * 3  # bytes of a unit, so that every source is divided


def options(*arguments, workers=0, **others) -> BuildOptions:
    return BuildOptions(*arguments, workers=workers, unit_bytes=EIGHT_IMAGES, **others)


@pytest.mark.parametrize("kind", SOURCES)
def test_every_source_gives_the_same_pixels_and_classes(tmp_path, kind):
    (tmp_path / "source").mkdir()
    source = SOURCES[kind](tmp_path / "source")
    labels = str(source / "labels.csv") if kind == "csv" else None
    build(options(str(source), str(tmp_path / "out"), (16,), labels=labels), show=False)
    dataset = open_dataset(str(tmp_path / "out"))
    pixels, numbers = dataset.gather(np.arange(dataset.n))
    found = {x.tobytes(): int(y) for x, y in zip(pixels.numpy(), numbers, strict=True)}
    assert dataset.n == 24
    assert dataset.lossy is False
    if kind == "npy":
        assert dataset.num_classes == 0
        assert found == {x.tobytes(): 0 for x in IMAGES}
    else:
        assert dataset.num_classes == 3
        assert found == {x.tobytes(): i % 3 for i, x in enumerate(IMAGES)}
    if kind in ("folder", "zip", "tar", "csv"):
        assert dataset.class_names == CLASSES
    assert dataset.mean == pytest.approx(IMAGES.reshape(-1, 3).mean(0).tolist())
    assert dataset.std == pytest.approx(IMAGES.reshape(-1, 3).std(0).tolist())
    assert verify_dataset(str(tmp_path / "out")) == []
    assert not [f for f in os.listdir(tmp_path) if "build" in f]


def test_cifar10_is_read_from_its_binary_archive_and_its_pickled_one_is_refused(tmp_path):
    """Records as its page describes them: a label, then the red, green and blue planes."""
    random = np.random.default_rng(0)
    records = random.integers(0, 256, (6, 4, 3073), np.uint8)
    records[:, :, 0] %= 10
    with tarfile.open(tmp_path / "cifar-10-binary.tar.gz", "w:gz") as archive:
        for batch, file in zip(records, [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"], strict=True):
            add_file(archive, f"cifar-10-batches-bin/{file}.bin", batch.tobytes())
    build(options(str(tmp_path / "cifar-10-binary.tar.gz"), str(tmp_path / "out"), (32,)), show=False)
    dataset = open_dataset(str(tmp_path / "out"))
    pixels, labels = dataset.gather(np.arange(20))
    flat = records[:5].reshape(20, 3073)
    assert labels.tolist() == flat[:, 0].tolist()
    assert np.array_equal(pixels.numpy(), flat[:, 1:].reshape(20, 3, 32, 32).transpose(0, 2, 3, 1))
    assert dataset.heldout.n == 4
    assert dataset.class_names[3] == "cat"
    with tarfile.open(tmp_path / "cifar-10-python.tar.gz", "w:gz") as archive:
        add_file(archive, "cifar-10-batches-py/test_batch", pickle.dumps({"data": 1}))
    with pytest.raises(UserError, match=r"cifar-10-binary\.tar\.gz"):
        build(options(str(tmp_path / "cifar-10-python.tar.gz"), str(tmp_path / "no"), (32,)), show=False)


def test_several_resolutions_and_a_held_out_share_in_one_pass(tmp_path):
    source = make_folder(tmp_path / "source")
    folders = build(options(str(source), str(tmp_path / "out"), (16, 8, 4), split=0.3), show=False)
    assert [f.rsplit("/", 1)[1] for f in folders] == ["4", "8", "16"]
    for side in (4, 8, 16):
        dataset = open_dataset(resolve(str(tmp_path / "out"), side, str(tmp_path)))
        assert dataset.resolution == side
        assert dataset.n + dataset.heldout.n == 24
        assert 1 <= dataset.heldout.n <= 14
    names = {side: [open_dataset(f).name(i) for i in range(3)] for side, f in zip((4, 8, 16), folders, strict=True)}
    assert names[4] == names[8] == names[16]
    with pytest.raises(UserError, match=r"\[4, 8, 16\]"):
        resolve(str(tmp_path / "out"), 32, str(tmp_path))
    assert verify_dataset(str(tmp_path / "out")) == []


def test_unusable_images_are_listed_and_left_out_or_stop_a_strict_build(tmp_path):
    source = make_folder(tmp_path / "source")
    (source / "ant" / "99.png").write_bytes(png(IMAGES[0])[:60])
    (source / "bee" / "small.png").write_bytes(png(IMAGES[0][:4, :4]))
    (source / "bee" / "empty.jpg").write_bytes(b"")
    build(options(str(source), str(tmp_path / "out"), (16,)), show=False)
    with open(tmp_path / "out" / "rejected.csv") as file:
        rows = {row["image"]: row["reason"] for row in csv.DictReader(file)}
    assert set(rows) == {"ant/99.png", "bee/small.png", "bee/empty.jpg", "notes.txt"}
    assert "smaller than 16" in rows["bee/small.png"]
    assert read_manifest(str(tmp_path / "out")).rejected == 3, "notes.txt is no image"
    assert open_dataset(str(tmp_path / "out")).n == 24
    with pytest.raises(UserError, match="strict"):
        build(options(str(source), str(tmp_path / "strict"), (16,), strict=True), show=False)
    assert not (tmp_path / "strict").exists()


def test_names_that_leave_the_archive_are_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "bad.zip", "w") as archive:
        for file in ("../../outside.png", "/etc/absolute.png", "good/1.png", "a\\..\\b.png"):
            archive.writestr(file, png(IMAGES[0]))
    with tarfile.open(tmp_path / "bad.tar", "w") as archive:
        for file in ("../../outside.png", "/etc/absolute.png", "good/1.png"):
            add_file(archive, file, png(IMAGES[0]))
        link = tarfile.TarInfo("link/1.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    for source, n in (("bad.zip", 3), ("bad.tar", 3)):
        out = tmp_path / source.replace(".", "-")
        build(options(str(tmp_path / source), str(out), (16,)), show=False)
        dataset = open_dataset(str(out))
        assert dataset.n == 1
        assert dataset.class_names == ["good"]
        assert dataset.manifest.rejected == n
    assert not (tmp_path.parent / "outside.png").exists()


def test_no_pickle_in_an_npz_is_opened(tmp_path):
    np.savez(tmp_path / "bad.npz", images=np.array([{"a": 1}] * 3, dtype=object))
    with pytest.raises(UserError, match="pickled"):
        build(options(str(tmp_path / "bad.npz"), str(tmp_path / "out"), (16,)), show=False)


def test_an_npz_is_named_and_not_where_it_is_unpacked(tmp_path):
    np.savez(tmp_path / "wide.npz", images=np.zeros((3, 8, 8, 3), np.int64))
    with pytest.raises(UserError, match=r"SOURCE = 'wide\.npz/images: int64 \(3, 8, 8, 3\)") as refused:
        build(options(str(tmp_path / "wide.npz"), str(tmp_path / "out"), (8,)), show=False)
    assert "spool" not in refused.value.text()


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("form", ["npz", "arrow"])
def test_latents_pass_through_unchanged(tmp_path, dtype, form):
    latents = np.random.default_rng(0).standard_normal((20, 5, 6, 6)).astype(dtype)
    if form == "npz":
        source = tmp_path / "latents.npz"
        np.savez(source, latents=latents, labels=np.arange(20) % 4)
    else:
        source = tmp_path / "latents.arrow"
        column = pa.FixedShapeTensorArray.from_numpy_ndarray(latents)
        table = pa.table({"latents": column, "label": pa.array(np.arange(20) % 4)})
        with pa.OSFile(str(source), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table)
        direct = open_dataset(resolve(str(source), None, str(tmp_path)))
        assert np.array_equal(direct.gather(np.arange(20))[0].numpy(), latents)
    build(options(str(source), str(tmp_path / "out"), ()), show=False)
    dataset = open_dataset(str(tmp_path / "out"))
    got, labels = dataset.gather(np.arange(20))
    assert dataset.is_latent
    assert (dataset.channels, dataset.resolution, dataset.dtype) == (5, 6, dtype)
    assert np.array_equal(got.numpy(), latents)
    assert labels.tolist() == [i % 4 for i in range(20)]
    with pytest.raises(UserError, match="unchanged"):
        build(options(str(source), str(tmp_path / "no"), (3,)), show=False)


def test_large_images_are_kept_encoded_and_a_fitting_file_is_kept_byte_for_byte(tmp_path):
    (tmp_path / "source").mkdir()
    photo = np.tile(pictures(1, side=16)[0], (2, 3, 1))
    files = {
        "a.png": png(photo[:, :32]),
        "b.jpg": png(photo[:, :32], "JPEG"),
        "c.png": png(photo),
        "d.webp": png(photo, "WEBP", lossless=True),
    }
    for file, data in files.items():
        (tmp_path / "source" / file).write_bytes(data)
    chosen = options(str(tmp_path / "source"), str(tmp_path / "out"), (32,), layout="encoded", shuffle=False)
    build(chosen, show=False)
    dataset = open_dataset(str(tmp_path / "out"))
    stored = [bytes(dataset.shard(0).images[i].as_buffer()) for i in range(4)]
    assert stored[0] == files["a.png"]
    assert stored[1] == files["b.jpg"]
    assert dataset.lossy
    assert dataset.manifest.lossy_images == 1
    pixels = dataset.gather(np.array([2, 0, 1, 3]))[0].numpy()
    assert np.array_equal(pixels[0], photo[:, 8:40])
    assert np.array_equal(pixels[1], photo[:, :32])
    assert np.array_equal(pixels[2], np.asarray(Image.open(io.BytesIO(files["b.jpg"]))))
    assert np.array_equal(pixels[3], photo[:, 8:40])
    assert verify_dataset(str(tmp_path / "out")) == []


def test_the_result_does_not_depend_on_workers_shards_or_memory(tmp_path, ray_on_two_cpus):
    source = make_folder(tmp_path / "source")
    hashes = set()
    for i, others in enumerate(({}, {"workers": 2}, {"shard_bytes": 4000}, {"workers": None, "memory": 2 * 10**9})):
        build(options(str(source), str(tmp_path / f"{i}"), (16,), **others), show=False)
        hashes.add(open_dataset(str(tmp_path / f"{i}")).content_hash)
    assert len(hashes) == 1
    assert len(read_manifest(str(tmp_path / "2")).splits["train"].shards) > 2
    with pytest.raises(UserError, match="--memory"):
        build(options(str(source), str(tmp_path / "tiny"), (16,), memory=10**8), show=False)


def test_a_finished_build_is_not_repeated_and_another_one_is_not_overwritten(tmp_path):
    source = make_folder(tmp_path / "source")
    build(options(str(source), str(tmp_path / "out"), (16,)), show=False)
    before = {f.name: f.stat().st_mtime_ns for f in (tmp_path / "out").iterdir()}
    build(options(str(source), str(tmp_path / "out"), (16,)), show=False)
    assert {f.name: f.stat().st_mtime_ns for f in (tmp_path / "out").iterdir()} == before
    with pytest.raises(UserError, match="another dataset"):
        build(options(str(source), str(tmp_path / "out"), (16,), preparation=Preparation(filter="box")), show=False)


@pytest.mark.parametrize("source", ["missing", "empty", "text"])
def test_a_source_without_images_is_one_clear_error_and_leaves_nothing(tmp_path, source):
    (tmp_path / "empty").mkdir()
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_text("hello")
    with pytest.raises(UserError, match="SOURCE"):
        build(options(str(tmp_path / source), str(tmp_path / "out"), (16,)), show=False)
    assert sorted(os.listdir(tmp_path)) == ["empty", "text"]


def test_an_interrupted_build_continues_and_repeats_no_unit(tmp_path, ray_on_two_cpus):
    source = make_folder(tmp_path / "source")
    chosen = options(str(source), str(tmp_path / "out"), (16,), workers=2)

    def stop_after_one(title, index):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(chosen, show=False, on_task=stop_after_one)
    assert not (tmp_path / "out").exists()
    done = {int(f.stem) for f in (tmp_path / ".out.build" / "done").glob("[0-9]*")}  # others are being written
    assert len(done) >= 1
    again = []
    build(chosen, show=False, on_task=lambda title, index: again.append(index) if title == "units" else None)
    assert not done & set(again)
    assert open_dataset(str(tmp_path / "out")).n == 24


@pytest.mark.slow
def test_a_build_killed_at_any_moment_gives_the_same_dataset(tmp_path):
    """SIGKILL of the command and its workers after some units, and again after some shards; then the same command runs
    to the end. Finished tasks stay unchanged, and the result equals an uninterrupted build's to the byte."""
    source = tmp_path / "source"
    for i, image in enumerate(pictures(1500, side=128)):
        (source / f"{i % 5}").mkdir(parents=True, exist_ok=True)
        (source / f"{i % 5}" / f"{i:04d}.png").write_bytes(png(image, compress_level=0))
    command = [
        sys.executable,
        "-m",
        "diffscale.data",
        "build",
        str(source),
        "--resolution",
        "128",
        "--resolution",
        "16",
    ]
    command += ["--resolution", "16", "--shard-megabytes", "2", "--split", "0.1"]
    subprocess.run([*command, str(tmp_path / "whole")], check=True, capture_output=True)
    work = tmp_path / ".cut.build"
    kept: dict[Path, int] = {}
    for files, enough in (("done/*.json", 1), ("done/*.json", 2), ("shards/*.json", 3)):
        process = subprocess.Popen(
            [*command, str(tmp_path / "cut")],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        deadline = time.monotonic() + 120
        while len(list(work.glob(files))) < enough and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.005)
        os.killpg(process.pid, signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        assert not (tmp_path / "cut" / "128" / "manifest.json").exists()
        assert all(file.stat().st_mtime_ns == time_ns for file, time_ns in kept.items())
        kept = {file: file.stat().st_mtime_ns for file in work.glob("done/*.json")}
        assert len(kept) >= 1
    subprocess.run([*command, str(tmp_path / "cut")], check=True, capture_output=True)
    assert not work.exists()
    for side in ("16", "128"):
        files = sorted(os.listdir(tmp_path / "whole" / side))
        assert sorted(os.listdir(tmp_path / "cut" / side)) == files
        for file in files:
            whole, cut = ((tmp_path / name / side / file).read_bytes() for name in ("whole", "cut"))
            assert whole == cut, file
    assert verify_dataset(str(tmp_path / "cut")) == []


@pytest.mark.parametrize("shuffle", [None, True, False])
def test_rows_of_a_sorted_source_are_stored_in_random_order_in_shards_of_one_size(tmp_path, shuffle):
    """A few shards must be a fair sample of the classes; arrays and tables keep their order by default."""
    source = make_folder(tmp_path / "source")
    chosen = options(str(source), str(tmp_path / "out"), (16,), shuffle=shuffle, shard_bytes=6000)
    build(chosen, show=False)
    dataset = open_dataset(str(tmp_path / "out"))
    names = [dataset.name(i) for i in range(24)]
    assert sorted(names) == sorted(image_name(i) for i in range(24))
    assert (names == sorted(names)) is (shuffle is False)
    assert dataset.manifest.source["shuffled"] is (shuffle is not False)
    rows = [shard.rows for shard in dataset.split.shards]
    assert len(rows) > 2
    assert len(set(rows[:-1])) == 1
    pixels, labels = dataset.gather(np.arange(24))
    for i in range(24):  # the rows stayed together
        number = int(names[i].split("/")[1][:2])
        assert np.array_equal(pixels[i].numpy(), IMAGES[number])
        assert labels[i] == number % 3


def test_arrays_keep_their_order(tmp_path):
    source = make_npz(tmp_path)
    build(options(str(source), str(tmp_path / "out"), (16,)), show=False)
    assert np.array_equal(open_dataset(str(tmp_path / "out")).gather(np.arange(24))[0].numpy(), IMAGES)


def test_gzip_that_ends_early_is_a_clear_error(tmp_path):
    whole = make_tar(tmp_path, "w:gz").read_bytes()
    (tmp_path / "cut.tar.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="gzip"):
        build(options(str(tmp_path / "cut.tar.gz"), str(tmp_path / "out"), (16,)), show=False)
    (tmp_path / "not.tar.gz").write_bytes(gzip.compress(b"not a tar" * 1000))
    with pytest.raises(UserError, match="tar"):
        build(options(str(tmp_path / "not.tar.gz"), str(tmp_path / "out"), (16,)), show=False)


def test_row_groups_of_parquet_are_divided_and_bad_rows_listed(tmp_path):
    rows = [{"bytes": png(x), "path": None} for x in IMAGES]
    rows[5] = {"bytes": None, "path": "/etc/passwd"}
    rows[6] = {"bytes": b"bad", "path": None}
    table = pa.table({"image": rows, "label": [CLASSES[i % 3] for i in range(24)]})
    pq.write_table(table, tmp_path / "train.parquet", row_group_size=5)
    build(options(str(tmp_path / "train.parquet"), str(tmp_path / "out"), (16,)), show=False)
    dataset = open_dataset(str(tmp_path / "out"))
    assert dataset.n == 22
    assert dataset.class_names == CLASSES
    text = (tmp_path / "out" / "rejected.csv").read_text()
    assert "train.parquet:5,the row has no image bytes" in text
    assert "train.parquet:6" in text
