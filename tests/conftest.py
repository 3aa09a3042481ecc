"""What all tests share."""

from __future__ import annotations

import time

import pytest

STARTED = time.monotonic()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--time-budget",
        type=float,
        default=None,
        metavar="SECONDS",
        help="begin no further test after so long; the ones left out are reported as skipped",
    )


def pytest_runtest_setup(item: pytest.Item) -> None:
    budget = item.config.getoption("--time-budget")
    if budget is not None and time.monotonic() - STARTED > budget:
        pytest.skip(f"not run: the time budget of {budget:.0f} s is used up")
