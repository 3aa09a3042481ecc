"""Following a job: every character of its log once, its own exit code, and Ctrl-C as a request to stop."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from diffscale.core.errors import UserError
from diffscale.distributed import jobs


class Status(str):
    def is_terminal(self) -> bool:
        return self in ("SUCCEEDED", "FAILED", "STOPPED")


class Client:
    """A dashboard that loses the connection, and at last reports the end of the job."""

    def __init__(self, connections: list[tuple[list[str], type[BaseException] | None]], status: str, code: int | None):
        self.connections, self.end = connections, (status, code)
        self.stopped: list[str] = []

    async def tail_job_logs(self, job: str):
        texts, error = self.connections.pop(0)
        for text in texts:
            yield text
        if error:
            raise error

    def get_job_info(self, job: str) -> SimpleNamespace:
        status, code = self.end
        return SimpleNamespace(status=Status(status), driver_exit_code=code, message="")

    def stop_job(self, job: str) -> None:
        self.stopped.append(job)


@pytest.fixture(autouse=True)
def without_waiting(monkeypatch):
    monkeypatch.setattr(jobs, "POLL", 0.0)


def test_the_log_is_printed_once_over_lost_connections(capsys):
    connections = [(["one\n", "tw"], ConnectionError), (["one\ntwo\n"], None)]
    assert jobs.Follower(Client(connections, "FAILED", 2), "job").run() == 2
    assert capsys.readouterr().out == "one\ntwo\n"


def test_ctrl_c_stops_the_job_and_follows_it_to_its_end(capsys):
    client = Client([(["one\n"], KeyboardInterrupt), (["one\n", "saved\n"], None)], "STOPPED", None)
    assert jobs.Follower(client, "job").run() == jobs.STOPPED
    assert client.stopped == ["job"]
    assert capsys.readouterr().out.endswith("saved\n")


@pytest.mark.parametrize(
    ("status", "code", "expected"),
    [("SUCCEEDED", 0, 0), ("FAILED", 75, 75), ("FAILED", None, 1), ("STOPPED", -15, jobs.STOPPED)],
)
def test_exit_codes(status, code, expected):
    assert jobs.exit_code(SimpleNamespace(status=status, driver_exit_code=code, message="")) == expected


def test_the_runtime_environment_names_the_commit(tmp_path: Path):
    file = tmp_path / "env.yaml"
    file.write_text("env_vars: {A: '1'}")
    assert set(jobs.load_runtime_env(file)["env_vars"]) == {"A", "DIFFSCALE_COMMIT", "DIFFSCALE_DIRTY"}
    file.write_text("- a")
    with pytest.raises(UserError, match="runtime-env"):
        jobs.load_runtime_env(file)
