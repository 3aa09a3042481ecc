"""Several real Ray nodes on one machine: Linux network namespaces joined by a switch, each node with its own address.

Needs root and iproute2. The switch lives in a separate namespace, so the machine's network is untouched; a node's
cable can be pulled and put back, or made slow, and everything inside a node can be killed like a power cut.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from benchmarks.common.measure import wait_for
from diffscale.distributed.connect import NODE_ENVIRONMENT

PORT = 6379
CONFIGURATION = Path("/etc/netns")  # CONFIGURATION/NAME/hosts is /etc/hosts inside the namespace: see ip-netns(8)
READY = 240.0  # seconds for a node to register


def unavailable() -> str:
    """Why namespaces cannot be used here; empty when they can."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return "network namespaces need Linux and root"
    if shutil.which("ip") is None:
        return "iproute2 is not installed (apt-get install iproute2)"
    name = f"ds-{secrets.token_hex(3)}"
    try:
        _ip("netns", "add", name)
        _ip("netns", "del", name)
    except subprocess.CalledProcessError as error:
        return f"no permission to make network namespaces ({error.stderr.strip()})"
    return ""


class Node:
    """One machine: a namespace with one cable to the switch. `start` runs Ray in it, `kill` cuts its power."""

    def __init__(self, network: Network, index: int) -> None:
        self.network, self.index = network, index
        self.name = f"{network.prefix}-n{index}"
        self.address = f"10.77.0.{10 + index}"
        self.cable = f"v{network.prefix[3:]}{index}"  # the switch's end; at most 15 letters
        _ip("netns", "add", self.name)
        self._write_hosts()
        _ip("link", "add", self.cable, "type", "veth", "peer", "name", "eth0", "netns", self.name)
        _ip("link", "set", self.cable, "netns", network.switch)
        _ip("-n", network.switch, "link", "set", self.cable, "master", "br0", "up")
        _ip("-n", self.name, "address", "add", f"{self.address}/24", "dev", "eth0")
        for device in ("lo", "eth0"):
            _ip("-n", self.name, "link", "set", device, "up")
        _ip(
            "-n", self.name, "route", "add", "default", "dev", "eth0"
        )  # Ray finds its address by asking for a route out

    def _write_hosts(self) -> None:
        """Names for all addresses: no name server is in reach, and torch asks for the name of each peer, 3 s each."""
        names = [f"10.77.0.{10 + i} {self.network.prefix}-n{i}" for i in range(len(self.network.cpus))]
        file = CONFIGURATION / self.name / "hosts"
        file.parent.mkdir(parents=True)
        file.write_text("\n".join(["127.0.0.1 localhost", f"{self.address} {socket.gethostname()}", *names, ""]))

    def popen(self, *command: str, log: Path, **environment: str) -> subprocess.Popen[bytes]:
        """A process inside the node; its output goes to `log`."""
        with open(log, "ab") as file:
            return subprocess.Popen(
                ["ip", "netns", "exec", self.name, *command],
                env=self.network.environment | environment,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def run(self, *command: str, timeout: float = 120, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["ip", "netns", "exec", self.name, *command],
            env=self.network.environment | environment,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )

    def start(self) -> None:
        """Starts Ray; the first node is the head."""
        head = self.network.nodes[0]
        role = ["--head", f"--port={PORT}", "--include-dashboard=false"]
        command = ["ray", "start", *(role if self is head else [f"--address={head.address}:{PORT}"])]
        command += [f"--node-ip-address={self.address}", f"--num-cpus={self.network.cpus[self.index]}"]
        command += [
            f"--temp-dir={self.network.folder}/n{self.index}",
            "--object-store-memory=100000000",
            "--disable-usage-stats",
            "--block",
        ]
        self.popen(*command, log=self.network.folder / f"ray-{self.index}.log")

    def pids(self) -> list[int]:
        return [int(pid) for pid in _ip("netns", "pids", self.name).split()]

    def find(self, title: str) -> list[int]:
        """Processes of this node whose title contains a text: `RayTrainWorker`."""
        found = []
        for pid in self.pids():
            with contextlib.suppress(OSError):
                if title in Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace"):
                    found.append(pid)
        return found

    def kill(self) -> None:
        """Power cut: SIGKILL to everything inside."""
        for _ in range(20):
            pids = self.pids()
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            if not pids:
                return
            time.sleep(0.1)

    def unplug(self) -> None:
        _ip("-n", self.network.switch, "link", "set", self.cable, "down")

    def plug(self) -> None:
        _ip("-n", self.network.switch, "link", "set", self.cable, "up")

    def slow(self, rate: str = "1mbit") -> None:
        """Limits what reaches the node and what it sends to `rate`."""
        shape = ["root", "tbf", "rate", rate, "burst", "32kbit", "latency", "400ms"]
        _run("tc", "-n", self.network.switch, "qdisc", "add", "dev", self.cable, *shape)
        _run("tc", "-n", self.name, "qdisc", "add", "dev", "eth0", *shape)

    def fast(self) -> None:
        _run("tc", "-n", self.network.switch, "qdisc", "del", "dev", self.cable, "root")
        _run("tc", "-n", self.name, "qdisc", "del", "dev", "eth0", "root")


class Network:
    """A switch and its nodes; everything is removed at the end."""

    def __init__(self, nodes: int, cpus: list[int] | None = None, **environment: str) -> None:
        self.cpus = cpus or [1] * nodes
        self.prefix = f"ds-{secrets.token_hex(3)}"
        self.switch = f"{self.prefix}-sw"
        self.folder = Path(
            tempfile.mkdtemp(prefix="dsn-", dir="/tmp")
        )  # short: sockets have paths of 107 bytes at most
        token = self.folder / "auth_token"
        token.touch(mode=0o600)
        token.write_text(secrets.token_hex(32))
        left_out = ("RAY_", "DIFFSCALE_", "PYTHONDONTWRITEBYTECODE")  # the last: workers would compile at each start
        clean = {k: v for k, v in os.environ.items() if not k.startswith(left_out)}
        self.environment = clean | {
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(token),
            "RAY_ADDRESS": f"10.77.0.10:{PORT}",
            **NODE_ENVIRONMENT,
            "OMP_NUM_THREADS": "1",
            "PYTHONUNBUFFERED": "1",
            "GLOO_SOCKET_IFNAME": "eth0",
            **environment,
        }
        _ip("netns", "add", self.switch)
        _ip("-n", self.switch, "link", "add", "br0", "type", "bridge", "forward_delay", "0")
        _ip("-n", self.switch, "link", "set", "br0", "up")
        self.nodes: list[Node] = []
        for index in range(nodes):
            self.nodes.append(Node(self, index))

    @property
    def head(self) -> Node:
        return self.nodes[0]

    def start(self) -> None:
        """Starts Ray on all nodes and waits until all have registered."""
        self.head.start()
        wait_for(lambda: self.alive() >= 1, READY, "the head node")
        for node in self.nodes[1:]:
            node.start()
        wait_for(lambda: self.alive() >= len(self.nodes), READY, "all nodes")

    def alive(self) -> int:
        """Living nodes, as the head's GCS knows them."""
        if self.head.run("bash", "-c", f"exec 3<>/dev/tcp/{self.head.address}/{PORT}").returncode:
            return 0
        code = (
            "import sys; from ray._raylet import GcsClient; from ray.core.generated.gcs_pb2 import GcsNodeInfo as I; "
            "print(sum(n.state == I.ALIVE for n in GcsClient(sys.argv[1]).get_all_node_info().values()))"
        )
        done = self.head.run(sys.executable, "-c", code, f"{self.head.address}:{PORT}")
        return int(done.stdout) if done.returncode == 0 else 0

    def close(self) -> None:
        for node in self.nodes:
            with contextlib.suppress(subprocess.CalledProcessError):
                node.kill()
        for name in [node.name for node in self.nodes] + [self.switch]:
            with contextlib.suppress(subprocess.CalledProcessError):
                _ip("netns", "del", name)
            shutil.rmtree(CONFIGURATION / name, ignore_errors=True)
        shutil.rmtree(self.folder, ignore_errors=True)


@contextlib.contextmanager
def network(nodes: int, cpus: list[int] | None = None, **environment: str) -> Iterator[Network]:
    """A running cluster of `nodes` Ray nodes with `cpus` CPUs (one each by default)."""
    net = Network(nodes, cpus, **environment)
    try:
        net.start()
        yield net
    finally:
        net.close()


def _ip(*arguments: str) -> str:
    return _run("ip", *arguments)


def _run(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout
