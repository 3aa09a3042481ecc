from __future__ import annotations

from pathlib import Path

import pytest

from diffscale.report import write_report

from .records import benchmark_records, write_runs


@pytest.fixture(scope="session")
def storage(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_runs(tmp_path_factory.mktemp("storage"), benchmark_records())


@pytest.fixture(scope="session")
def report(storage: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The whole report of `storage`, made once."""
    out = tmp_path_factory.mktemp("report")
    write_report([storage], out, title="A & B <report>")
    return out
