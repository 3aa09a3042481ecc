"""Datasets in an object store: a real S3 API server (moto) behind a proxy that fails, stalls and cuts answers off."""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import tarfile
import threading
import time
import urllib.error
import urllib.request
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from diffscale.config.load import load_experiment
from diffscale.core import storage
from diffscale.core.errors import UserError
from diffscale.data import Loader, ShardCache, ShardError, open_dataset, resolve
from diffscale.data.build.build import BuildOptions, build
from diffscale.data.format.checksums import verify_dataset
from diffscale.data.loading.lanes import lane_share
from diffscale.training.parallel import World
from diffscale.training.shared_dataset import open_for_ranks
from tests.support.datasets import pictures, write_dataset

moto_server = pytest.importorskip("moto.server", reason="moto is not installed")


DROPPED = {"content-length", "transfer-encoding", "expect"}


class Faults:
    """The proxy's faults in requests for shards: the next `errors` get 503, `cut` are cut off, all wait `delay` s.

    The next `throttled` requests for anything else get 503 SlowDown, as S3 answers above its rate.
    """

    def __init__(self) -> None:
        self.errors = self.cut = self.throttled = 0
        self.delay = 0.0
        self.reads: list[str] = []
        self.requests: list[str] = []


@pytest.fixture(scope="module")
def server():
    server = moto_server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture(scope="module")
def proxy(server):
    faults = Faults()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def body(self) -> bytes | None:
            if self.headers.get("Transfer-Encoding") != "chunked":
                length = int(self.headers.get("Content-Length") or 0)
                return self.rfile.read(length) if length else None
            data = b""
            while size := int(self.rfile.readline().split(b";")[0], 16):
                data += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return data

        def forward(self) -> None:
            body = self.body()
            is_read = self.command == "GET" and ".arrow" in self.path
            faults.requests.append(f"{self.command} {self.path}")
            if faults.throttled and not is_read:
                faults.throttled -= 1
                self.send_error(503, "Slow Down")
                return
            if is_read:
                faults.reads.append(self.path)
                time.sleep(faults.delay)
                if faults.errors:
                    faults.errors -= 1
                    self.send_error(503, "Slow Down")
                    return
            headers = {k: v for k, v in self.headers.items() if k.lower() not in DROPPED}
            request = urllib.request.Request(server + self.path, data=body, headers=headers, method=self.command)
            try:
                answer = urllib.request.urlopen(request)
            except urllib.error.HTTPError as error:
                answer = error
            with answer:
                data = answer.read()
                self.send_response(answer.status)
                for key, value in answer.headers.items():
                    if key.lower() not in ("transfer-encoding", "connection", "content-length"):
                        self.send_header(key, value)
                size = answer.headers.get("Content-Length") if self.command == "HEAD" else len(data)
                self.send_header("Content-Length", str(size or 0))
                self.end_headers()
                if is_read and faults.cut:
                    faults.cut -= 1
                    self.wfile.write(data[: len(data) // 2])
                    self.close_connection = True
                    return
                self.wfile.write(data)

        do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = forward

        def log_message(self, *args) -> None:
            pass

    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{httpd.server_port}", faults
    httpd.shutdown()


@pytest.fixture
def bucket(server, proxy, monkeypatch):
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy[0])
    name = f"bucket-{time.monotonic_ns()}"
    urllib.request.urlopen(urllib.request.Request(f"{server}/{name}", method="PUT")).close()
    proxy[1].__init__()
    return f"s3://{name}"


IMAGES = pictures(60)


@pytest.fixture
def remote(bucket):
    write_dataset(f"{bucket}/data", IMAGES)
    return f"{bucket}/data"


def test_a_remote_dataset_is_fetched_once_and_read_like_a_local_one(remote, proxy, tmp_path):
    cache = ShardCache(str(tmp_path / "cache"))
    dataset = open_dataset(resolve(remote, 8, "/unused"), cache=cache)
    assert proxy[1].reads == []  # nothing before it is needed
    assert np.array_equal(dataset.gather(np.arange(60))[0].numpy(), IMAGES)
    reads = len(proxy[1].reads)
    again = open_dataset(remote, cache=cache)
    assert np.array_equal(again.gather(np.arange(60))[0].numpy(), IMAGES)
    assert len(proxy[1].reads) == reads
    with Loader(again, seed=0, global_batch=20, stop=60) as loader:
        assert sum(len(batch) for batch in loader) == 60
    assert verify_dataset(remote) == []


def test_errors_of_the_server_and_cut_answers_are_tried_again(remote, proxy, tmp_path):
    dataset = open_dataset(remote, cache=ShardCache(str(tmp_path / "cache")))
    proxy[1].errors, proxy[1].cut = 2, 2
    assert np.array_equal(dataset.gather(np.arange(60))[0].numpy(), IMAGES)
    assert proxy[1].errors == proxy[1].cut == 0


def test_a_dataset_is_listed_and_not_asked_for_each_shard(bucket, proxy):
    """46,000 shards on 1,024 ranks were 47 million HEADs, two hours and a half at S3's rate."""
    counts = []
    for shards in (3, 30):
        write_dataset(f"{bucket}/data-{shards}", IMAGES, shards=shards)
        proxy[1].requests.clear()
        open_dataset(f"{bucket}/data-{shards}")
        counts.append(len(proxy[1].requests))
        assert not [request for request in proxy[1].requests if ".arrow" in request]
    assert counts[0] == counts[1]


def test_a_bucket_that_throttles_is_asked_again_later(remote, proxy):
    proxy[1].throttled = 3
    assert open_dataset(remote).n == 60
    assert proxy[1].throttled == 0


def test_a_dataset_that_is_replaced_while_a_run_starts_is_refused(bucket):
    """The command has derived the run's identity from what it has found; its workers find something else."""
    settings = [f"data.path={bucket}/data", f"storage={bucket}", "data.resolution=8"]
    write_dataset(f"{bucket}/data", IMAGES)
    experiment = load_experiment("quickstart-unet", settings)
    found = open_dataset(f"{bucket}/data").content_hash
    assert open_for_ranks(experiment, World(), found).content_hash == found
    write_dataset(f"{bucket}/data", pictures(60, seed=1))
    with pytest.raises(UserError, match=r"data\.path(.|\n)*replaced since"):
        open_for_ranks(experiment, World(), found)


def test_a_node_fetches_the_shards_of_its_lanes_alone(bucket, proxy, tmp_path):
    """Of 24 shards each of four nodes fetches the six in its lanes, and the cache needs no room for others."""
    write_dataset(f"{bucket}/data", pictures(240), shards=24)
    form = {"seed": 0, "global_batch": 8, "order": "lanes", "lanes": 8, "stop": 240 * 2}
    fetched = []
    for rank in range(4):
        proxy[1].reads.clear()
        cache = ShardCache(str(tmp_path / str(rank)), gigabytes=6.5 * _largest(f"{bucket}/data") / 1e9)
        dataset = open_dataset(f"{bucket}/data", cache=cache)
        with Loader(dataset, shard=lane_share(8, rank, 4, 8), **form) as loader:
            assert sum(len(batch) for batch in loader) == 120
        fetched.append(set(proxy[1].reads))
        assert len(proxy[1].reads) == 6
    assert len(set.union(*fetched)) == 24
    with pytest.raises(UserError, match=r"data\.cache_gigabytes(.|\n)*smaller data\.lanes"):
        Loader(dataset, **form)


def test_slow_reads_only_take_longer(remote, proxy, tmp_path):
    dataset = open_dataset(remote, cache=ShardCache(str(tmp_path / "cache")))
    proxy[1].delay = 0.3
    with Loader(dataset, seed=0, global_batch=20, stop=60) as loader:
        assert sum(len(batch) for batch in loader) == 60


def test_a_shard_that_stays_damaged_or_goes_missing_is_named(remote, tmp_path, monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    data = bytearray(storage.read_bytes(f"{remote}/train-00001.arrow"))
    data[len(data) // 2] ^= 1
    storage.write_bytes(f"{remote}/train-00001.arrow", bytes(data))
    dataset = open_dataset(remote, cache=ShardCache(str(tmp_path / "cache")))
    with pytest.raises(ShardError, match=r"s3://.*train-00001\.arrow.*\n.*\n.*SHA-256"):
        dataset.gather(np.arange(60))
    assert not list((tmp_path / "cache").glob("*.arrow*tmp"))
    storage.write_bytes(f"{remote}/train-00001.arrow", bytes(data[:-100]))
    with pytest.raises(ShardError, match=r"train-00001\.arrow"):
        open_dataset(remote)
    filesystem, path = storage.filesystem(f"{remote}/train-00001.arrow")
    filesystem.delete_file(path)
    with pytest.raises(ShardError, match="missing"):
        open_dataset(remote)


def test_the_cache_is_bounded_and_drops_what_was_used_least_recently(remote, tmp_path):
    cache = ShardCache(str(tmp_path / "cache"), gigabytes=2.5 * _largest(remote) / 1e9)
    dataset = open_dataset(remote, cache=cache)
    for rows in (range(20), range(20, 40), range(40, 60), range(60)):
        assert np.array_equal(dataset.gather(np.array(rows))[0].numpy(), IMAGES[rows])
    files = list((tmp_path / "cache").glob("*.arrow"))
    assert len(files) == 2
    assert dataset.split.shards[0].sha256 not in {f.stem for f in files}


def test_shards_that_left_the_cache_take_no_disk_space(remote, tmp_path):
    """A deleted file takes its space as long as someone maps it: the dataset lets go of it."""
    folder = str(tmp_path / "cache")
    dataset = open_dataset(remote, cache=ShardCache(folder, gigabytes=2.5 * _largest(remote) / 1e9))
    for first in (0, 20, 40, 0, 20, 40):
        dataset.gather(np.arange(first, first + 20))
        mapped = {
            line.split(maxsplit=5)[5] for line in Path("/proc/self/maps").read_text().splitlines() if folder in line
        }
        assert len(mapped) <= 2, mapped


def test_a_cache_that_every_batch_would_overflow_is_refused(remote, tmp_path):
    cache = ShardCache(str(tmp_path / "cache"), gigabytes=2.5 * _largest(remote) / 1e9)
    dataset = open_dataset(remote, cache=cache)
    with pytest.raises(UserError, match=r"data\.cache_gigabytes.*\n.*\n.*data\.order=blocks"):
        Loader(dataset, seed=0, global_batch=20)
    with Loader(dataset, seed=0, global_batch=20, stop=60, order="blocks", window=1) as loader:
        assert sum(len(batch) for batch in loader) == 60


def test_the_next_window_is_fetched_while_the_present_one_is_used(remote, proxy, tmp_path):
    dataset = open_dataset(remote, cache=ShardCache(str(tmp_path / "cache")))
    with Loader(dataset, seed=0, global_batch=5, stop=60, order="blocks", window=1, prefetch=1) as loader:
        next(iter(loader))
        deadline = time.monotonic() + 10
        while len(set(proxy[1].reads)) < 3 and time.monotonic() < deadline:
            time.sleep(0.02)
        assert len(set(proxy[1].reads)) == 3


def test_a_fetch_that_was_killed_is_taken_over_and_its_space_given_back(remote, tmp_path):
    cache = ShardCache(str(tmp_path / "cache"), gigabytes=2.5 * _largest(remote) / 1e9)
    dataset = open_dataset(remote, cache=cache)
    other, same = "0" * 64, dataset.split.shards[0].sha256
    cache.root.mkdir(parents=True)
    for sha in (other, same):  # what two killed workers left
        with open(cache.root / f"{sha}.tmp", "wb") as file:
            file.truncate(10**9)
    dataset.gather(np.arange(20))
    assert [f.name for f in cache.root.iterdir() if f.is_file()] == [f"{same}.arrow"]


def _largest(remote: str) -> int:
    shards = json.loads(storage.read_bytes(f"{remote}/manifest.json"))["splits"]["train"]["shards"]
    return max(shard["bytes"] for shard in shards)


def _encoded(image: np.ndarray) -> bytes:
    out = io.BytesIO()
    Image.fromarray(image).save(out, "PNG")
    return out.getvalue()


@pytest.mark.parametrize("kind", ["folder", "zip", "tar", "webdataset", "parquet", "npz"])
def test_a_dataset_is_built_from_and_into_an_object_store(bucket, tmp_path, kind):
    images = pictures(12, side=16, seed=3)
    files = {f"{'ab'[i % 2]}/{i:02d}.png": _encoded(image) for i, image in enumerate(images)}
    source = f"{bucket}/source" + {"folder": "", "webdataset": "", "npz": ".npz"}.get(kind, f".{kind}")
    if kind == "folder":
        for file, data in files.items():
            storage.write_bytes(f"{source}/{file}", data)
    elif kind == "npz":
        np.savez(tmp_path / "data.npz", images=images, labels=np.arange(12) % 2)
        storage.write_bytes(source, (tmp_path / "data.npz").read_bytes())
    elif kind == "parquet":
        table = pa.table({"image": [{"bytes": d, "path": None} for d in files.values()], "label": list("ab" * 6)})
        pq.write_table(table, tmp_path / "data.parquet", row_group_size=5)
        storage.write_bytes(source, (tmp_path / "data.parquet").read_bytes())
    elif kind == "zip":
        with zipfile.ZipFile(tmp_path / "data.zip", "w") as archive:
            for file, data in files.items():
                archive.writestr(file, data)
        storage.write_bytes(source, (tmp_path / "data.zip").read_bytes())
    else:
        with tarfile.open(tmp_path / "data.tar", "w") as archive:
            for i, (file, data) in enumerate(files.items()):
                parts = (
                    {file: data} if kind == "tar" else {f"{i:05d}.png": data, f"{i:05d}.cls": b"01"[i % 2 : i % 2 + 1]}
                )
                for member, content in parts.items():
                    info = tarfile.TarInfo(member)
                    info.size = len(content)
                    archive.addfile(info, io.BytesIO(content))
        target = source if kind == "tar" else f"{source}/shard-000.tar"
        storage.write_bytes(target, (tmp_path / "data.tar").read_bytes())
    build(BuildOptions(source, f"{bucket}/out", (16,), workers=0), show=False)
    assert verify_dataset(f"{bucket}/out") == []
    dataset = open_dataset(f"{bucket}/out", cache=ShardCache(str(tmp_path / "cache")))
    pixels, labels = dataset.gather(np.arange(12))
    found = {x.tobytes(): int(y) for x, y in zip(pixels.numpy(), labels, strict=True)}
    assert found == {image.tobytes(): i % 2 for i, image in enumerate(images)}
    assert dataset.class_counts == (6, 6)
    if kind == "parquet":
        direct = open_dataset(resolve(source, 16, "/unused"))
        assert (direct.class_names, direct.class_counts) == (["a", "b"], (6, 6))


def _read_all(remote: str, folder: str) -> bool:
    dataset = open_dataset(remote, cache=ShardCache(folder))
    return bool(np.array_equal(dataset.gather(np.arange(60))[0].numpy(), IMAGES))


def test_several_workers_of_a_node_share_the_cache(remote, proxy, tmp_path):
    os.environ["AWS_MAX_ATTEMPTS"] = "1"
    with multiprocessing.get_context("spawn").Pool(3) as pool:
        assert all(pool.starmap(_read_all, [(remote, str(tmp_path / "cache"))] * 3))
    assert len(set(proxy[1].reads)) == 3
    assert len(proxy[1].reads) == 3  # each shard once for the whole node
