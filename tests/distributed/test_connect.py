"""A wrong RAY_ADDRESS is told at once: Ray itself would try for minutes."""

from __future__ import annotations

import socket
import subprocess
import sys

import pytest

CONNECT = """
import sys
from diffscale.core.errors import UserError
from diffscale.distributed.connect import connect
try:
    connect(sys.argv[1])
except UserError as error:
    print(error)
"""


def unused_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@pytest.mark.parametrize("host", ["127.0.0.1", "nowhere.invalid"])
def test_an_address_where_nothing_listens_is_named(host):
    address = f"{host}:{unused_port()}"
    done = subprocess.run([sys.executable, "-c", CONNECT, address], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert f"RAY_ADDRESS = '{address}'" in done.stdout
