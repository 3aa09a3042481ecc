"""The noise of a batch by one kernel is the noise of `keyed_random`: run by Triton's interpreter, without a GPU."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys

import pytest
import torch

from diffscale.core.keyed_random import normal
from diffscale.kernels import noise
from diffscale.kernels.noise import draw_normal

# seed, stream, positions, (C, H, W)
CASES = [
    (0, 1, [0, 1, 2], [3, 5, 7]),
    ((1 << 63) + 12345, 1 << 31, [5, (1 << 40) + 3, (1 << 32) - 1], [3, 8, 8]),
    (7, 6, [100, 101], [1, 1, 1]),
    ((1 << 64) - 1, 1, [9], [4, 16, 40]),
]
PROGRAM = """
import json, sys, torch
from diffscale.kernels.noise_triton import fill_normal

def drawn(seed, stream, positions, shape, channels_last):
    layout = torch.channels_last if channels_last else torch.contiguous_format
    out = torch.empty(len(positions), *shape, memory_format=layout)
    fill_normal(out, seed, stream, torch.tensor(positions))
    return out

torch.save([drawn(*case) for case in json.loads(sys.argv[1])], sys.argv[2])
"""


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")
def test_the_kernel_computes_the_same_numbers_in_both_memory_orders(tmp_path) -> None:
    """To one unit in the last place; equal to the bit where this was written."""
    cases = [
        [seed - (1 << 64) if seed >> 63 else seed, stream, positions, shape, channels_last]
        for seed, stream, positions, shape in CASES
        for channels_last in (False, True)
    ]
    file = tmp_path / "noise.pt"
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    run = subprocess.run([sys.executable, "-c", PROGRAM, json.dumps(cases), str(file)], env=environment, timeout=120)
    assert run.returncode == 0
    for case, got in zip(cases, torch.load(file), strict=True):
        want = normal(case[0] % (1 << 64), case[1], torch.tensor(case[2]), tuple(case[3]))
        assert got.shape == want.shape
        assert got.is_contiguous(memory_format=torch.channels_last if case[4] else torch.contiguous_format)
        apart = (got.view(torch.int32) - want.view(torch.int32)).abs()
        assert int(apart.max()) <= 1


@pytest.mark.parametrize("channels_last", [False, True])
def test_without_a_gpu_the_numbers_are_those_of_torchs_operations(channels_last: bool) -> None:
    positions = torch.arange(5) + 10
    got = draw_normal(3, 1, positions, (3, 6, 6), channels_last=channels_last)
    assert torch.equal(got, normal(3, 1, positions, (3, 6, 6)))
    assert got.is_contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")
@pytest.mark.parametrize("capability", [80, 90])
def test_the_kernel_compiles_for_a_gpu_that_is_not_here(capability: int) -> None:
    import triton
    from triton.backends.compiler import GPUTarget

    from diffscale.kernels.noise_triton import BLOCK, _normal

    integers = dict.fromkeys(("blocks", "count", "pixels", "channels"), "i32")
    signature = {"out": "*fp32", "positions": "*i64", "seed": "i64", "stream": "i64", **integers}
    signature |= {"CHANNELS_LAST": "constexpr", "SIZE": "constexpr"}
    source = triton.compiler.ASTSource(_normal, signature, {"CHANNELS_LAST": True, "SIZE": BLOCK})
    made = triton.compile(source, target=GPUTarget("cuda", capability, 32))
    assert "mul.hi.u32" in made.asm["ptx"]  # Philox's products
    assert len(made.asm["cubin"]) > 1000


def test_where_triton_fails_the_operations_draw_the_same_and_it_is_said(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Without a GPU, as with a driver that is too old, the kernel cannot be launched."""
    monkeypatch.setattr(noise, "_failed", False)
    positions = torch.arange(3)
    drawn = noise._fused(7, 1, positions, [3, 4, 4], False)
    assert torch.equal(drawn, normal(7, 1, positions, (3, 4, 4)))
    assert noise._failed
    assert "because Triton failed" in caplog.text
