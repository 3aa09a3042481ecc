"""Programs as jobs of a Ray cluster: connecting to the dashboard, submitting, following the log to the exit code."""

from __future__ import annotations

import asyncio
import logging
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import aiohttp
import yaml

from diffscale.core.errors import UserError
from diffscale.core.provenance import job_environment
from diffscale.core.text import one_line

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

POLL = 1.0  # seconds
AGENT_SECONDS = 120.0
STOPPED = 143  # 128 + SIGTERM, as a shell reports a program that was stopped


def open_client(address: str) -> JobSubmissionClient:
    """Return a client of the dashboard. Raises UserError if nothing answers or the token is refused."""
    from ray.job_submission import JobSubmissionClient  # import cost

    logging.disable(logging.WARNING)  # Ray prints thirty lines about packaging
    try:
        client = JobSubmissionClient(address)
        client.list_jobs()
    except Exception as error:  # Ray raises RuntimeError, ValueError, ConnectionError and errors of HTTP libraries
        reason = one_line(error, 300)
        refused = any(word in reason for word in ("401", "403", "nauthorized", "token"))
        token = "export RAY_AUTH_MODE=token and the cluster's token in RAY_AUTH_TOKEN_PATH or ~/.ray/auth_token"
        raise UserError(
            setting="address",
            value=address,
            expected="the dashboard of a Ray cluster that accepts this user",
            reason=reason,
            fix=token if refused else "forward the head's dashboard to it (cluster/README.md), or give --address",
        ) from None
    return client


def submit_job(client: JobSubmissionClient, entrypoint: str, environment: dict[str, Any]) -> str:
    """Return the id of the new job. Raises UserError with Ray's reason if the job is refused.

    A cluster that has just started has no agent to run the job yet: the request is repeated for AGENT_SECONDS.
    """
    end = time.monotonic() + AGENT_SECONDS
    while True:
        try:
            return client.submit_job(entrypoint=entrypoint, runtime_env=environment)
        except (RuntimeError, ValueError) as error:
            reason = one_line(error, 300)
            if "No available agent" in reason and time.monotonic() < end:
                time.sleep(POLL)
                continue
            raise UserError(
                setting="submit", value=entrypoint, expected="a job that Ray accepts", reason=reason
            ) from None


def load_runtime_env(path: Path) -> dict[str, Any]:
    """Return the file's runtime environment with the commit added.

    Ray leaves `.git` out of a job's upload, so the records can name the commit only if it travels in a variable.
    """
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
        if not isinstance(values, dict) or not isinstance(values.get("env_vars", {}), dict):
            raise ValueError("the file is not a mapping, or its env_vars is not one")
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(
            setting="runtime-env",
            value=str(path),
            expected="a YAML file with a runtime environment of Ray",
            reason=one_line(error),
            fix="submit from the repository's root, or give --runtime-env",
        ) from None
    return values | {"env_vars": {**values.get("env_vars", {}), **job_environment()}}


class Follower:
    """The reader of one job's log: prints every line once, however often the connection is lost."""

    def __init__(self, client: JobSubmissionClient, job: str) -> None:
        self.client, self.job = client, job
        self.shown = 0  # characters of the log printed so far; every connection starts at the log's beginning

    def run(self) -> int:
        """Return the program's exit code. Ctrl-C stops the job and keeps following it; a second Ctrl-C leaves it."""
        stopping = False
        while True:
            try:
                asyncio.run(self._print_log())
                info = self.client.get_job_info(self.job)
                if info.status.is_terminal():
                    return exit_code(info)
            except KeyboardInterrupt:
                if stopping:
                    print(f"\njob {self.job} is still stopping: ray job status {self.job}", flush=True)
                    return STOPPED
                stopping = True
                print("\nstopping the job; it writes a checkpoint first (Ctrl-C again to stop watching)", flush=True)
                self.client.stop_job(self.job)
            except (OSError, RuntimeError, aiohttp.ClientError) as error:
                print(f"connection lost ({type(error).__name__}), trying again", file=sys.stderr, flush=True)
            time.sleep(POLL)

    async def _print_log(self) -> None:
        seen = 0
        async for text in self.client.tail_job_logs(self.job):
            new = text[max(self.shown - seen, 0) :]
            seen += len(text)
            self.shown = max(self.shown, seen)
            sys.stdout.write(new)
            sys.stdout.flush()


def exit_code(info: Any) -> int:
    """Return 0 for success, 143 for a stopped job, else the program's own exit code.

    info: Ray's JobDetails of a job that has ended.
    """
    if info.status == "SUCCEEDED":
        return 0
    if info.status == "STOPPED":
        return STOPPED
    if info.message and info.driver_exit_code is None:
        print(f"the job did not start: {info.message}", file=sys.stderr)
    return info.driver_exit_code or 1
