"""One way to reach Ray: the cluster that RAY_ADDRESS names, else a private one on this machine."""

from __future__ import annotations

import logging
import os

import ray

REPORT_INTERVAL = "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"
START_TIMEOUT = "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"


def connect(address: str | None = None, num_cpus: int | None = None) -> None:
    """Connects once; later calls do nothing. A private cluster listens on loopback only.

    Ray Train's controller polls its workers every 2 s by default, which is what makes short runs slow and a dead
    worker late to be noticed; its wait for lost nodes is 60 s. Both are set here unless the user did.
    """
    os.environ.setdefault(REPORT_INTERVAL, "0.2")
    os.environ.setdefault(START_TIMEOUT, "20")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    if ray.is_initialized():
        return
    address = address or os.environ.get("RAY_ADDRESS") or "local"
    if address == "local":
        ray.init(
            address="local",
            num_cpus=num_cpus,
            include_dashboard=False,
            object_store_memory=300_000_000,
            logging_level=logging.WARNING,
            log_to_driver=True,
        )
    else:
        ray.init(address=address, logging_level=logging.WARNING)
