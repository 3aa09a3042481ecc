"""The local two-node cluster: closed to everyone without the token, open to jobs with it."""

from __future__ import annotations

import stat
import sys
import urllib.error
import urllib.request

import psutil
import pytest


def pids_of(cluster) -> list[int]:
    """Processes of the cluster: everything in the process groups that cluster.sh started."""
    roots = [psutil.Process(int((cluster.folder / f"{name}.pid").read_text())) for name in ("head", "second")]
    return [p.pid for root in roots for p in [root, *root.children(recursive=True)]]


def test_everything_listens_on_loopback_only(local_cluster):
    addresses = {
        connection.laddr.ip
        for pid in pids_of(local_cluster)
        for connection in psutil.Process(pid).net_connections(kind="inet")
        if connection.status == psutil.CONN_LISTEN
    }
    assert addresses
    assert {address.removeprefix("::ffff:") for address in addresses} == {"127.0.0.1"}


def test_the_token_file_is_private(local_cluster):
    assert stat.S_IMODE((local_cluster.folder / "auth_token").stat().st_mode) == 0o600
    assert len(local_cluster.token) == 64


@pytest.mark.parametrize("headers", [{}, {"Authorization": "Bearer wrong"}])
def test_the_jobs_api_refuses_who_has_no_token(local_cluster, headers):
    body = b'{"entrypoint": "touch /tmp/diffscale-owned"}'
    request = urllib.request.Request(
        f"{local_cluster.dashboard}/api/jobs/", body, {"Content-Type": "application/json"} | headers
    )
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(request, timeout=30)
    assert refused.value.code in (401, 403)


def test_submit_without_the_token_is_refused_in_one_screen(local_cluster, tmp_path):
    done = local_cluster.run(
        sys.executable,
        "-m",
        "diffscale.submit",
        "--",
        "train",
        "quickstart-unet",
        RAY_AUTH_MODE="disabled",
        RAY_AUTH_TOKEN_PATH="",
        HOME=str(tmp_path),
    )
    assert done.returncode == 2, done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    assert "RAY_AUTH_MODE=token" in done.stderr


@pytest.mark.slow
def test_a_driver_without_the_token_cannot_join(local_cluster, tmp_path):
    code = f"import ray; ray.init(address='{local_cluster.address}', log_to_driver=False); print('inside')"
    done = local_cluster.run(
        sys.executable, "-c", code, RAY_AUTH_MODE="disabled", RAY_AUTH_TOKEN_PATH="", HOME=str(tmp_path)
    )
    assert done.returncode != 0
    assert "inside" not in done.stdout


def test_submit_exits_with_the_jobs_code_and_the_token_stays_out_of_the_log(local_cluster):
    done = local_cluster.run(sys.executable, "-m", "diffscale.submit", "--", "doctor", "no-such-preset")
    assert done.returncode == 2, done.stdout + done.stderr
    assert "no-such-preset" in done.stdout
    assert "Traceback" not in done.stdout
    assert "\x1b[" not in done.stdout, "no terminal codes in a log"
    assert "packaging" not in done.stdout + done.stderr, "Ray's notes about the upload are left out"
    assert local_cluster.token not in done.stdout + done.stderr


@pytest.mark.slow
def test_doctor_sees_both_nodes(local_cluster, tmp_path):
    done = local_cluster.run(
        sys.executable, "-m", "diffscale.doctor", "--storage", str(tmp_path), RAY_ADDRESS=local_cluster.address
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "gloo over 2 processes" in done.stdout
    assert "from 2 nodes" in done.stdout


GROUP = """
import sys
from ray.util import placement_group, placement_group_table
from diffscale.distributed.connect import connect
connect()
if sys.argv[1] == "reserve":  # a detached group outlives its job, as one does that a dying controller asked for
    assert placement_group([{"CPU": 0.5}], lifetime="detached").wait(60)
print(sorted(group["state"] for group in placement_group_table().values()))
"""


def test_what_a_killed_command_had_reserved_is_freed_by_the_next_one(local_cluster, tmp_path):
    ours, other = tmp_path / "diffscale_command.py", tmp_path / "another_program.py"
    ours.write_text(GROUP)
    other.write_text(GROUP)
    local_cluster.run(sys.executable, str(other), "reserve", check=True, RAY_ADDRESS=local_cluster.address)
    local_cluster.run(sys.executable, str(ours), "reserve", check=True, RAY_ADDRESS=local_cluster.address)
    done = local_cluster.run(sys.executable, str(ours), "look", check=True, RAY_ADDRESS=local_cluster.address)
    assert "freed what 1 killed" in done.stderr
    assert done.stdout.strip() == "['CREATED', 'REMOVED']"  # another program's group stays
