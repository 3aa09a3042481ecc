"""`python -m diffscale.submit -- train PRESET key=value ...`: one diffscale command as a Ray job, followed to its end.

It differs from `ray job submit` in three ways. The exit code is the program's own; Ray's command exits with 1 for every
failure. Ctrl-C stops the job and waits for its checkpoint; Ray's command leaves the job running. The commit is sent
with the job; Ray leaves it out. Submit the same command again to resume the run.
"""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from typing import Annotated

import typer

from diffscale.core.app import COMMANDS, command_app, run_app
from diffscale.core.errors import UserError
from diffscale.core.text import nearest
from diffscale.distributed.jobs import Follower, load_runtime_env, open_client, submit_job

app = command_app()

RUNTIME_ENV = Path("cluster/runtime_env.yaml")
DEFAULT_ADDRESS = "http://127.0.0.1:8265"


@app.command(context_settings={"ignore_unknown_options": True})
def main(
    command: Annotated[list[str], typer.Argument(help="-- train|tune|evaluate|... PRESET key=value ...")],
    address: Annotated[str | None, typer.Option(help="dashboard; default $RAY_API_SERVER_ADDRESS")] = None,
    runtime_env: Annotated[Path, typer.Option(help="YAML file")] = RUNTIME_ENV,
    working_dir: Annotated[Path, typer.Option(help="code to upload, without what .rayignore names")] = Path("."),
    wait: Annotated[bool, typer.Option(help="follow the log and exit with the job's code")] = True,
) -> None:
    """Submit a diffscale command to a Ray cluster."""
    entrypoint = shlex.join(["python", "-m", module_of(command[0]), *command[1:]])
    client = open_client(address or os.environ.get("RAY_API_SERVER_ADDRESS") or DEFAULT_ADDRESS)
    environment = load_runtime_env(runtime_env) | {"working_dir": str(working_dir.resolve())}
    job = submit_job(client, entrypoint, environment)
    print(f"job {job}: {entrypoint}", flush=True)
    raise typer.Exit(Follower(client, job).run() if wait else 0)


def module_of(command: str) -> str:
    """Return the module of a command: diffscale.train for `train`; a module of benchmarks is its own name."""
    if command.startswith("benchmarks."):
        return command
    if command not in COMMANDS or command == "submit":
        raise UserError(setting="COMMAND", value=command, expected=nearest(command, set(COMMANDS) - {"submit"}))
    return f"diffscale.{command}"


if __name__ == "__main__":
    run_app(app)
