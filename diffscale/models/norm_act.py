"""Group normalisation, scale and shift, and SiLU as one operation.

On a CPU torch's own group norm is several times slower on channels-last images than on contiguous ones, and
convolutions are up to twice as slow on contiguous ones, so a UNet loses either way. norm_act.cpp makes one pass
of it; it is compiled once (a second), kept in the user's cache and used for channels-last images outside torch.compile.
Everywhere else, and where there is no compiler, torch's operations are used. DIFFSCALE_NATIVE_KERNELS=0 turns it off.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

log = logging.getLogger(__name__)

_SOURCE = Path(__file__).with_name("norm_act.cpp")
_FLAGS = ("-O3", "-march=native", "-std=c++17", "-fno-math-errno", "-fno-trapping-math", "-fopenmp", "-shared", "-fPIC")


def norm_act(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    eps: float,
    *,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    silu: bool = True,
) -> Tensor:
    """silu(group_norm(x)·(1 + scale) + shift) in the precision of x. x (B, C, H, W); scale and shift (B, C) or None."""
    if _suits_kernel(x):
        gamma, beta = weight[None].expand(len(x), -1), bias[None].expand(len(x), -1)
        if scale is not None and shift is not None:
            gamma, beta = gamma * (1 + scale.float()), torch.addcmul(shift.float(), beta, 1 + scale.float())
        return _NormAct.apply(x, gamma.float().contiguous(), beta.float().contiguous(), groups, eps, silu)
    y = F.group_norm(x, groups, weight.to(x.dtype), bias.to(x.dtype), eps)
    if scale is not None and shift is not None:
        scale, shift = scale.to(x.dtype)[:, :, None, None], shift.to(x.dtype)[:, :, None, None]
        y = torch.addcmul(shift, y, 1 + scale)
    return F.silu(y) if silu else y


def _suits_kernel(x: Tensor) -> bool:
    return (
        x.device.type == "cpu"
        and not torch.compiler.is_compiling()
        and x.dtype in (torch.bfloat16, torch.float32)
        and x.dim() == 4
        and x.shape[1] > 1
        and x.is_contiguous(memory_format=torch.channels_last)
        and type(x) is Tensor
        and kernel() is not None
    )


class _NormAct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, gamma: Tensor, beta: Tensor, groups: int, eps: float, silu: bool) -> Tensor:
        b, c, h, w = x.shape
        y = torch.empty_like(x)
        mean, rstd = x.new_empty(b, groups, dtype=torch.float32), x.new_empty(b, groups, dtype=torch.float32)
        pointers = (t.data_ptr() for t in (x, y, mean, rstd, gamma, beta))
        bf16, threads = int(x.dtype == torch.bfloat16), torch.get_num_threads()
        kernel().norm_act_forward(*pointers, b, h * w, c, groups, eps, int(silu), bf16, threads)  # type: ignore[union-attr]
        ctx.save_for_backward(x, mean, rstd, gamma, beta)
        ctx.groups, ctx.silu = groups, silu
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, mean, rstd, gamma, beta = ctx.saved_tensors
        b, c, h, w = x.shape
        dy = dy.to(x.dtype).contiguous(memory_format=torch.channels_last)
        dx, dgamma, dbeta = torch.empty_like(x), torch.empty_like(gamma), torch.empty_like(beta)
        pointers = (t.data_ptr() for t in (x, dy, mean, rstd, gamma, beta, dx, dgamma, dbeta))
        bf16, threads = int(x.dtype == torch.bfloat16), torch.get_num_threads()
        kernel().norm_act_backward(*pointers, b, h * w, c, ctx.groups, int(ctx.silu), bf16, threads)  # type: ignore[union-attr]
        return dx, dgamma, dbeta, None, None, None


@functools.cache
def kernel() -> ctypes.CDLL | None:
    """The compiled library, built on first use; None where that is impossible or not wanted."""
    compiler = shutil.which("g++") or shutil.which("c++")
    if os.environ.get("DIFFSCALE_NATIVE_KERNELS") == "0" or compiler is None:
        return None
    try:
        library = ctypes.CDLL(str(_build(compiler)))
    except (OSError, subprocess.SubprocessError) as error:
        log.warning("norm_act.cpp could not be compiled, torch's group norm is used instead: %s", error)
        return None
    pointer, integer, number = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
    flag = ctypes.c_int
    library.norm_act_forward.argtypes = [pointer] * 6 + [integer] * 4 + [number, flag, flag, flag]
    library.norm_act_backward.argtypes = [pointer] * 9 + [integer] * 4 + [flag, flag, flag]
    library.norm_act_forward.restype = library.norm_act_backward.restype = None
    return library


def _build(compiler: str) -> Path:
    """Compile into the user's own cache, under a name that changes with source, flags, compiler and processor."""
    version = subprocess.run([compiler, "--version"], capture_output=True, check=True, timeout=30).stdout
    cpu = Path("/proc/cpuinfo")
    flags = (
        next((line for line in cpu.read_text().splitlines() if line.startswith("flags")), "") if cpu.exists() else ""
    )
    parts = (_SOURCE.read_bytes(), " ".join(_FLAGS).encode(), version, flags.encode(), platform.machine().encode())
    key = hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "diffscale"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if folder.stat().st_uid != os.getuid() or not os.access(folder, os.W_OK):
            raise PermissionError(f"{folder} is not this user's own")
    except OSError:
        folder = Path(tempfile.mkdtemp(prefix="diffscale-"))
    target = folder / f"norm_act-{key}.so"
    if not target.exists():
        descriptor, scratch = tempfile.mkstemp(dir=folder, suffix=".so")
        os.close(descriptor)
        subprocess.run([compiler, *_FLAGS, str(_SOURCE), "-o", scratch], capture_output=True, check=True, timeout=120)
        os.replace(scratch, target)
    return target
