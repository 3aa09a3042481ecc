"""Freed memory is kept for the next tensors, where the C library has a setting for it."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

TURNS = """
import resource, sys, torch
from diffscale.kernels.runtime import keep_freed_memory
if sys.argv[1] == "keep":
    assert keep_freed_memory()
for turn in range(20):
    if turn == 10:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    tensor = torch.ones(12 * 2**20)
    del tensor
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc can be told to keep freed memory")
def test_large_tensors_cost_no_page_faults_the_second_time():
    faults = [
        int(subprocess.run([sys.executable, "-c", TURNS, how], capture_output=True, check=True, timeout=120).stdout)
        for how in ("keep", "leave")
    ]
    assert faults[0] < faults[1] / 10
