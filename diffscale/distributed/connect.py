"""One way to reach Ray: the cluster that RAY_ADDRESS names, else a private one on this machine's loopback."""

from __future__ import annotations

import logging
import os
import secrets
import socket
import sys
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any

from diffscale.core.cache import home_dir
from diffscale.core.errors import UserError
from diffscale.distributed.leftovers import free_leftovers

REPORT_INTERVAL = "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"
START_TIMEOUT = "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"
HEALTH_TIMEOUT = "RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S"
PREEMPTION_WATCHER = "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"
SEVERAL_NODES = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"

# The environment in which every node of a larger cluster starts Ray (the image, cluster.sh, train.sbatch). With these
# values a dead machine is noticed after 5 times 1 s and a silent one after 5 times (1 + 4) s; with Ray's defaults after
# 5 times 3 s and 5 times (3 + 10) s. Five misses in a row outlast a link that is interrupted for 5 s.
NODE_ENVIRONMENT = {
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "4000",
    "RAY_health_check_failure_threshold": "5",
    "RAY_worker_niceness": "0",  # Ray's 15 starves the workers on a machine with other programs
}

SHORTEST_INTERVAL = 0.2  # seconds
POLLED_PER_SECOND = 1000.0  # workers; one Python process manages about 5,000 calls a second
ELASTIC_WAIT, AUTOSCALING_WAIT = 20.0, 600.0  # seconds for the workers' resources
CHOSEN = "DIFFSCALE_CHOSEN_INTERVALS"  # marks the values below as diffscale's for the processes that inherit them
_GIVEN = {name for name in (REPORT_INTERVAL, START_TIMEOUT) if name in os.environ} - {
    *os.environ.get(CHOSEN, "").split(",")
}

CREATE = os.O_WRONLY | os.O_CREAT | os.O_EXCL

_KIND = "accelerator_type:"
_private = False


def is_private() -> bool:
    """Return whether this process has started the cluster, which then ends with the process."""
    return _private


def connect(address: str | None = None, num_cpus: int | None = None) -> None:
    """Connect this process to Ray once; later calls do nothing.

    Raises UserError if no cluster answers at the address, and if a private one does not start.

    address: address of a cluster; "local" for a private one; None for $RAY_ADDRESS, else a private one.
    num_cpus: CPUs of a private cluster; None for all of this machine.
    """
    global _private
    address = address or os.environ.get("RAY_ADDRESS") or "local"
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_worker_niceness", "0")  # Ray's 15 starves the workers on a machine with other programs
    if not sys.stdout.isatty():
        os.environ.setdefault("RAY_COLOR_PREFIX", "0")  # or workers' lines carry terminal codes into a job's log
    if address == "local":  # its machine is never preempted: each run starts one process fewer
        os.environ.setdefault(PREEMPTION_WATCHER, "0")
    if address == "local" and "ray" not in sys.modules:
        # Without the variable Ray 2.60 listens on every interface even for one node (measured). Ray reads it and
        # RAY_AUTH_MODE when it is imported, so a program that has imported Ray before decides for itself.
        os.environ.setdefault(SEVERAL_NODES, "0")
        _require_token()
    import ray  # import cost

    if ray.is_initialized():
        return
    if address == "local":
        if SEVERAL_NODES not in os.environ:
            warnings.warn(
                "Ray was imported before diffscale connected, so its private cluster listens on every network "
                f"interface; set {SEVERAL_NODES}=0 before `import ray` to keep it on this machine",
                stacklevel=2,
            )
        private = {
            "num_cpus": num_cpus,
            "include_dashboard": False,
            "object_store_memory": 300_000_000,
            "log_to_driver": False,  # workers' notices come through distributed/messages.py, without Ray's own noise
        }
        try:
            _start_or_join(address, **private)
        except UserError:
            print("Ray was not up within its 30 s, as on a busy machine; starting it again", file=sys.stderr)
            ray.shutdown()
            _start_or_join(address, **private)
        _private = True
    else:
        _require_listener(address)
        _start_or_join(address)
        if count := free_leftovers():
            print(f"freed what {count} killed commands had reserved on the cluster", file=sys.stderr)


def set_controller_intervals(fewest: int, most: int) -> None:
    """Set how Ray Train's controller treats its workers, unless the user has: call it before the trainer is made.

    It asks every worker for its state in each interval, 2 s by default, which makes short runs slow and notices a dead
    worker late. Here it asks at most 1,000 workers a second. It waits 60 s for the workers' resources before it asks
    for them again, perhaps for fewer workers. Only an elastic run (fewest < most) can take fewer, and asks sooner; one
    that needs all of them keeps its place while an autoscaling cluster grows.
    """
    values = {
        REPORT_INTERVAL: max(SHORTEST_INTERVAL, most / POLLED_PER_SECOND),
        START_TIMEOUT: ELASTIC_WAIT if fewest < most else AUTOSCALING_WAIT,
    }
    chosen = values.keys() - _GIVEN
    os.environ |= {name: f"{values[name]:g}" for name in chosen} | {CHOSEN: ",".join(sorted(chosen))}


def gpus() -> list[str]:
    """Return the kinds of the cluster's GPUs by Ray's names ("H100", ...).

    The cluster is the one that RAY_ADDRESS names or to which this process is connected. Before a private cluster is
    started, the GPUs are this machine's.
    """
    loaded = sys.modules.get("ray")
    if os.environ.get("RAY_ADDRESS") or (loaded is not None and loaded.is_initialized()):
        connect()
        import ray  # import cost

        resources = ray.cluster_resources()
        kinds = [name.removeprefix(_KIND) for name in resources if name.startswith(_KIND)]
        return (kinds or ["GPU"]) if resources.get("GPU", 0) > 0 else []
    import torch  # import cost

    return [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]


def authentication_mode() -> str:
    """Return "token" or "disabled": how the connected cluster authenticates its clients.

    Ray has no public function for it, and doctor must report the mode in effect. Once Ray has one, this import of
    ray._raylet can go.
    """
    from ray._raylet import AuthenticationMode, get_authentication_mode  # type: ignore[attr-defined]  # import cost

    return "token" if get_authentication_mode() == AuthenticationMode.TOKEN else "disabled"


def _start_or_join(address: str, **settings: Any) -> None:
    import ray  # import cost

    try:
        ray.init(address=address, logging_level=logging.WARNING, **settings)
    except Exception as error:  # Ray raises no narrower one when its processes are not up within 30 s
        raise UserError(
            setting="RAY_ADDRESS",
            value=address,
            expected="a reachable Ray cluster",
            reason=str(error),
            fix="on a busy machine try again; else see the newest /tmp/ray/session_*/logs of that machine",
        ) from error


def _require_listener(address: str) -> None:
    """Raise UserError unless something listens at HOST:PORT: Ray would try for minutes. Other forms are not checked."""
    host, _, port = address.rpartition(":")
    if "/" in address or not port.isdecimal():
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
    except (OSError, OverflowError) as error:
        raise UserError(
            setting="RAY_ADDRESS",
            value=address,
            expected="HOST:PORT of a running cluster's head",
            reason=str(error),
            fix="`ray start --head` prints it; without RAY_ADDRESS only this machine is used",
        ) from None


def _require_token() -> None:
    """Require Ray's token on the private cluster too, so that no other user of this machine can run code in it.

    Ray would write the token file readable by all (0644), so it is created before with mode 0600.
    """
    if "RAY_AUTH_MODE" in os.environ:
        return
    token = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or home_dir() / ".ray" / "auth_token")
    if "RAY_AUTH_TOKEN" not in os.environ:
        try:
            token.parent.mkdir(parents=True, exist_ok=True)
            if not token.exists():  # or another run has created it at the same moment
                with suppress(FileExistsError), open(os.open(token, CREATE, 0o600), "w") as file:
                    file.write(secrets.token_hex(32))
        except OSError as error:
            raise UserError(
                setting="RAY_AUTH_TOKEN_PATH" if "RAY_AUTH_TOKEN_PATH" in os.environ else "HOME",
                value=str(token),
                expected="a place that can be written: Ray's token for private clusters is kept there",
                reason=error.strerror or str(error),
                fix="set HOME to a folder that can be written, or RAY_AUTH_TOKEN_PATH to a file in one",
            ) from None
    os.environ["RAY_AUTH_MODE"] = "token"
