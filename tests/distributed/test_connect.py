"""A wrong RAY_ADDRESS is reported at once, and no command imports Ray before `connect` has closed it to strangers."""

from __future__ import annotations

import os
import socket
import subprocess
import sys

import pytest

from diffscale.distributed.connect import CHOSEN, REPORT_INTERVAL, START_TIMEOUT

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


COMMANDS = """
import importlib, sys
for name in sys.argv[1:]:
    importlib.import_module(name)
    if "ray" in sys.modules:
        sys.exit(f"{name} imports ray")
"""
COMMAND_MODULES = [
    "diffscale.doctor",
    "diffscale.ema",
    "diffscale.evaluate",
    "diffscale.quickstart",
    "diffscale.report",
    "diffscale.runs",
    "diffscale.sample",
    "diffscale.submit",
    "diffscale.train",
    "diffscale.tune",
    "diffscale.evaluation.folder",
    "diffscale.preflight.examine",
    "diffscale.sweep.run",
    "diffscale.training.draw_samples",
    "diffscale.training.evaluate_runs",
    "diffscale.training.posthoc_ema",
    "diffscale.training.run",
]


def test_no_command_imports_ray_before_it_connects():
    """Ray reads on import whether it requires a token and listens on loopback alone: `connect` must run before."""
    done = subprocess.run(
        [sys.executable, "-c", COMMANDS, *COMMAND_MODULES], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr


SWEEP = """
import sys
from diffscale.distributed import connect
from diffscale.sweep.ledger import Ledger
from diffscale.sweep.run import load_sweep, run

def stop(*_):
    sys.exit(3 if "ray" in sys.modules else 0)

connect.connect = stop
run(Ledger(load_sweep("quickstart", ["storage=" + sys.argv[1]])))
sys.exit(4)
"""


def test_a_sweep_connects_before_it_imports_ray(tmp_path):
    done = subprocess.run([sys.executable, "-c", SWEEP, str(tmp_path)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


INTERVALS = """
import os, subprocess, sys
from diffscale.distributed.connect import REPORT_INTERVAL, START_TIMEOUT, set_controller_intervals
for workers in ((1, 1), (1024, 1024), (2, 8)):
    set_controller_intervals(*workers)
    print(os.environ[REPORT_INTERVAL], os.environ[START_TIMEOUT], flush=True)
if "CHILD" not in os.environ:
    subprocess.run([sys.executable, "-c", os.environ["SCRIPT"]], env=os.environ | {"CHILD": "1"}, check=True)
"""
INTERVAL_SETTINGS = (REPORT_INTERVAL, START_TIMEOUT, CHOSEN)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, ["0.2 600", "1.024 600", "0.2 20"]),
        ({"RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "5"}, ["5 600", "5 600", "5 20"]),
    ],
)
def test_the_controller_polls_in_proportion_to_the_workers_and_waits_for_nodes(given, expected):
    """Every 0.2 s 1,024 workers were 5,100 calls a second, and every 20 s a growing cluster was asked anew.

    A process that inherits the values, as a sweep's runs do, does not take them for the user's.
    """
    outer = {name: value for name, value in os.environ.items() if name not in INTERVAL_SETTINGS}
    done = subprocess.run(
        [sys.executable, "-c", INTERVALS],
        env=outer | given | {"SCRIPT": INTERVALS},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.stdout.splitlines() == expected * 2, done.stderr
