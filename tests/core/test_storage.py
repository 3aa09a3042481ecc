"""Small durable files on a local folder and on a real S3 API server."""

from __future__ import annotations

from pathlib import Path

import boto3
import pytest
from moto.server import ThreadedMotoServer

from diffscale.core import storage
from diffscale.core.errors import UserError


@pytest.fixture(scope="module")
def bucket():
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        for key, value in {
            "AWS_ACCESS_KEY_ID": "testing",
            "AWS_SECRET_ACCESS_KEY": "testing",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        }.items():
            patch.setenv(key, value)
        boto3.client("s3").create_bucket(Bucket="storage")  # its own: the server of a process keeps its buckets
        yield "s3://storage"
    server.stop()


@pytest.mark.parametrize("where", ["local", "s3"])
def test_what_is_written_is_read_and_listed(where: str, tmp_path: Path, bucket: str) -> None:
    root = str(tmp_path) if where == "local" else bucket
    uri = storage.join(root, "a", "b.json")
    assert not storage.exists(uri)
    storage.write_bytes(uri, b"1")
    storage.write_bytes(uri, b"22")
    assert storage.read_bytes(uri) == b"22"
    assert storage.list_files(root, ".json", recursive=True) == [uri]
    assert storage.list_files(storage.join(root, "none")) == []
    with pytest.raises(FileNotFoundError):
        storage.read_bytes(storage.join(root, "missing"))


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    uri = str(tmp_path / "x")
    storage.write_bytes(uri, b"old")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        storage.write_bytes(uri, b"new")
    assert storage.read_bytes(uri) == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["x"]


def test_a_relative_storage_is_refused_with_the_absolute_path() -> None:
    with pytest.raises(UserError, match=r"storage=/.*/runs"):
        storage.check_absolute("runs")


def test_in_a_ray_job_a_relative_path_is_read_and_never_written(monkeypatch: pytest.MonkeyPatch) -> None:
    assert storage.resolve("runs") == str(Path("runs").absolute())
    monkeypatch.setenv("RAY_JOB_ID", "01000000")
    with pytest.raises(UserError, match="temporary copy"):
        storage.resolve("runs", "RUN")
    assert storage.resolve("runs", "RUNS", written=False) == str(Path("runs").absolute())
