"""`python -m diffscale.submit -- train PRESET key=value ...`: one diffscale command as a Ray job, watched to its end.

What `ray job submit` lacks: the exit code is the program's own (Ray's command exits with 1 for every failure), Ctrl-C
stops the job and waits for its checkpoint (Ray's leaves it running), and the commit travels along (Ray leaves it out).
Submitting the same command again resumes the run.
"""

from __future__ import annotations

import asyncio
import logging
import os
import shlex
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import aiohttp
import typer
import yaml

from diffscale.core.app import COMMANDS, command_app, run_app
from diffscale.core.errors import UserError
from diffscale.core.provenance import job_environment
from diffscale.core.text import nearest

app = command_app()

RUNTIME_ENV = Path("cluster/runtime_env.yaml")
DEFAULT_ADDRESS = "http://127.0.0.1:8265"
POLL = 1.0  # seconds
AGENT_SECONDS = 120.0
STOPPED = 143  # 128 + SIGTERM, as a shell reports a program that was stopped


@app.command(context_settings={"ignore_unknown_options": True})
def main(
    command: Annotated[list[str], typer.Argument(help="-- train|tune|evaluate|... PRESET key=value ...")],
    address: Annotated[str | None, typer.Option(help="dashboard; default $RAY_API_SERVER_ADDRESS")] = None,
    runtime_env: Annotated[Path, typer.Option(help="YAML file")] = RUNTIME_ENV,
    working_dir: Annotated[Path, typer.Option(help="code to upload, without what .rayignore names")] = Path("."),
    wait: Annotated[bool, typer.Option(help="follow the log and exit with the job's code")] = True,
) -> None:
    """Submit a diffscale command to a Ray cluster."""
    entrypoint = ["python", "-m", module_of(command[0]), *command[1:]]
    client = connect(address or os.environ.get("RAY_API_SERVER_ADDRESS") or DEFAULT_ADDRESS)
    environment = load_runtime_env(runtime_env) | {"working_dir": str(working_dir.resolve())}
    job = submit(client, shlex.join(entrypoint), environment)
    print(f"job {job}: {shlex.join(entrypoint)}", flush=True)
    raise typer.Exit(Follower(client, job).run() if wait else 0)


def module_of(command: str) -> str:
    """`train` -> diffscale.train, `benchmarks.report` as it is."""
    if command.startswith("benchmarks."):
        return command
    if command not in COMMANDS or command == "submit":
        raise UserError(setting="COMMAND", value=command, expected=nearest(command, set(COMMANDS) - {"submit"}))
    return f"diffscale.{command}"


def connect(address: str) -> Any:
    """A JobSubmissionClient. Raises UserError when nothing answers or the token is refused."""
    from ray.dashboard.modules.job.sdk import JobSubmissionClient

    logging.disable(logging.WARNING)  # Ray's thirty lines about packaging
    try:
        client = JobSubmissionClient(address)
        client.list_jobs()
    except Exception as error:
        text = " ".join(str(error).split())[:300]
        refused = any(word in text for word in ("401", "403", "nauthorized", "token"))
        fix = "export RAY_AUTH_MODE=token and the cluster's token in RAY_AUTH_TOKEN_PATH or ~/.ray/auth_token"
        fix = fix if refused else "forward the head's dashboard to it (cluster/README.md), or give --address"
        expected = "the dashboard of a Ray cluster that accepts this user: " + text
        raise UserError(setting="address", value=address, expected=expected, fix=fix) from None
    return client


def submit(client: Any, entrypoint: str, environment: dict[str, Any]) -> str:
    """The job's id. A cluster that has just started has no agent for a while: asked again until AGENT_SECONDS.

    Raises UserError with Ray's reason.
    """
    end = time.monotonic() + AGENT_SECONDS
    while True:
        try:
            return client.submit_job(entrypoint=entrypoint, runtime_env=environment)
        except (RuntimeError, ValueError) as error:
            text = " ".join(str(error).split())[:300]
            if "No available agent" in text and time.monotonic() < end:
                time.sleep(POLL)
                continue
            raise UserError(
                setting="submit", value=entrypoint, expected="a job that Ray accepts", reason=text
            ) from None


def load_runtime_env(path: Path) -> dict[str, Any]:
    """The file's runtime environment with the commit added, so that records name it (DECISIONS 7)."""
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
        if not isinstance(values, dict) or not isinstance(values.get("env_vars", {}), dict):
            raise ValueError("not a runtime environment with a mapping env_vars")
    except (OSError, ValueError, yaml.YAMLError) as error:
        message = " ".join(str(error).split())[:200]
        fix = "submit from the repository's root, or give --runtime-env"
        raise UserError(setting="runtime-env", value=str(path), expected=message, fix=fix) from None
    return values | {"env_vars": {**values.get("env_vars", {}), **job_environment()}}


class Follower:
    """Prints a job's log once, whatever the number of connections that it takes to read it."""

    def __init__(self, client: Any, job: str) -> None:
        self.client, self.job = client, job
        self.shown = 0  # characters of the log printed so far; every connection starts at its beginning

    def run(self) -> int:
        """Returns the program's exit code. Ctrl-C stops the job and goes on following; a second one leaves it."""
        stopping = False
        while True:
            try:
                asyncio.run(self._print_log())
                info = self.client.get_job_info(self.job)
                if info.status.is_terminal():
                    return exit_code(info)
            except KeyboardInterrupt:
                if stopping:
                    print(f"\njob {self.job} goes on stopping: ray job status {self.job}", flush=True)
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
    """0 for success, else the driver's own code; 143 for a stopped job."""
    if info.status == "SUCCEEDED":
        return 0
    if info.status == "STOPPED":
        return STOPPED
    if info.message and info.driver_exit_code is None:
        print(f"the job did not start: {info.message}", file=sys.stderr)
    return info.driver_exit_code or 1


if __name__ == "__main__":
    run_app(app)
