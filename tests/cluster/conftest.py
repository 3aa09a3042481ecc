"""A real Ray cluster for the tests: on loopback, with a token, own ports and folder, ended by its process ids."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class LocalCluster:
    """A cluster that cluster/local/cluster.sh has started."""

    folder: Path
    address: str
    dashboard: str
    environment: dict[str, str]  # of a client that has the token

    @property
    def token(self) -> str:
        return (self.folder / "auth_token").read_text().strip()

    def run(
        self, *command: str, check: bool = False, timeout: float = 240, **changes: str
    ) -> subprocess.CompletedProcess[str]:
        """Run a command in the repository's root with the client's environment."""
        environment = {k: v for k, v in (self.environment | changes).items() if v}
        return subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout, check=check
        )


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    try:
        for s in sockets:
            s.bind(("127.0.0.1", 0))
        return [s.getsockname()[1] for s in sockets]
    finally:
        for s in sockets:
            s.close()


@pytest.fixture(scope="module")
def local_cluster():
    if sys.platform != "linux":
        pytest.skip("cluster.sh is tested on Linux")
    folder = Path(tempfile.mkdtemp(prefix="ds-", dir="/tmp"))  # short: Ray's sockets have paths of at most 107 bytes
    port, dashboard, _ = free_ports(3)
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "DIFFSCALE_"))}
    environment = clean | {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "DIFFSCALE_CLUSTER": str(folder / "cluster"),
        "DIFFSCALE_PORT": str(port),
        "DIFFSCALE_DASHBOARD_PORT": str(dashboard),
        "DIFFSCALE_CPUS": "2",
        "DIFFSCALE_OBJECT_STORE": "100000000",
        "OMP_NUM_THREADS": "1",
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(folder / "cluster" / "auth_token"),
        "RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{dashboard}",
    }
    cluster = LocalCluster(folder / "cluster", f"127.0.0.1:{port}", f"http://127.0.0.1:{dashboard}", environment)
    script = str(ROOT / "cluster" / "local" / "cluster.sh")
    try:
        up = cluster.run(script, "up")
        assert up.returncode == 0, up.stdout + up.stderr
        yield cluster
    finally:
        cluster.run(script, "down")
        shutil.rmtree(folder, ignore_errors=True)
