"""Where the C++ sources cannot be compiled or are not wanted, torch's own operations are used and nothing fails."""

from __future__ import annotations

import pytest
import torch

from diffscale.kernels import compile as native
from diffscale.kernels.compile import library
from diffscale.kernels.group_norm import norm_act


@pytest.fixture
def forgetful():
    """Libraries are looked for again, and once more afterwards."""
    library.cache_clear()
    native._AVAILABLE.clear()
    yield
    library.cache_clear()
    native._AVAILABLE.clear()


@pytest.mark.parametrize("name", ["group_norm", "winograd", "winograd_bf16", "rows"])
def test_they_can_be_switched_off_by_environment(monkeypatch, forgetful, name):
    monkeypatch.setenv("DIFFSCALE_NATIVE_KERNELS", "0")
    assert library(name) is None


def test_a_compiler_that_fails_is_no_error(monkeypatch, tmp_path, caplog, forgetful):
    broken = tmp_path / "g++"
    broken.write_text('#!/bin/sh\n[ "$1" = --version ] && exit 0\nexit 1\n')
    broken.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert library("group_norm") is None
    assert "could not be compiled" in caplog.text
    x = torch.randn(1, 8, 2, 2).contiguous(memory_format=torch.channels_last)
    assert norm_act(x, torch.ones(8), torch.zeros(8), 2, 1e-5).shape == x.shape
