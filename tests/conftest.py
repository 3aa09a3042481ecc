"""What all tests share."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

STARTED = time.monotonic()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--time-budget",
        type=float,
        default=None,
        metavar="SECONDS",
        help="begin no further test after so long; the ones left out are reported as skipped",
    )


def pytest_runtest_setup(item: pytest.Item) -> None:
    budget = item.config.getoption("--time-budget")
    if budget is not None and time.monotonic() - STARTED > budget:
        pytest.skip(f"not run: the time budget of {budget:.0f} s is used up")


@pytest.fixture(scope="session", autouse=True)
def default_storage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """An empty default storage: a developer's own runs in `~/diffscale` change no test."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DIFFSCALE_STORAGE", str(tmp_path_factory.mktemp("storage")))
        yield


@pytest.fixture(scope="session")
def bucket() -> Iterator[str]:
    """A folder of a real S3 server on this machine."""
    boto3 = pytest.importorskip("boto3")
    server = pytest.importorskip("moto.server").ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    keys = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1"}
    with pytest.MonkeyPatch.context() as patch:
        for key, value in {**keys, "AWS_ENDPOINT_URL": f"http://{host}:{port}"}.items():
            patch.setenv(key, value)
        boto3.client("s3").create_bucket(Bucket="runs")
        yield "s3://runs/storage"
    server.stop()
