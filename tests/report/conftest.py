from __future__ import annotations

import pytest
from report_records import benchmark_records, write_runs


@pytest.fixture(scope="session")
def storage(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_runs(tmp_path_factory.mktemp("storage"), benchmark_records())
