"""Files from strangers. Each would leave a mark if any of its code ran."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import pytest


class Trap:
    """Unpickling it creates the file `mark`."""

    def __init__(self, mark: Path) -> None:
        self.mark = str(mark)

    def __reduce__(self):
        return os.mkdir, (self.mark,)


@pytest.fixture
def mark(tmp_path) -> Path:
    """Exists only if code from a file ran."""
    return tmp_path / "code-has-run"


@pytest.fixture
def trap(mark) -> Trap:
    return Trap(mark)


@pytest.fixture(autouse=True)
def nothing_ran(mark):
    yield
    assert not mark.exists(), "code from a file was run"


def test_the_trap_works(tmp_path):
    pickle.loads(pickle.dumps(Trap(tmp_path / "sprung")))
    assert (tmp_path / "sprung").exists()
