"""How this process computes: threads, freed memory, the precision of float32 on a GPU."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import sys
from collections.abc import Iterator

import torch
from torch.backends import cuda, cudnn

from diffscale.core.text import one_line

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of mallopt(3)
KEPT = 1 << 30  # bytes


def configure_process(threads: int, device: torch.device) -> None:
    """Set up a process that trains or evaluates.

    threads: number of threads; fixed, since sums depend on it and other workers use the other cores
    device: on a CPU, freed memory is kept for the next tensors; on a GPU, the same steps give the same weights until
        `exact_on_gpu(False)` is called
    """
    torch.set_num_threads(threads)
    if device.type == "cpu":
        keep_freed_memory()
    else:
        exact_on_gpu(True)


def exact_on_gpu(exact: bool) -> None:
    """Choose the algorithms of a GPU for the whole process.

    exact: True for those that give the same result every time: convolutions and gradients of attention add in a fixed
        order, cuBLAS has workspaces of its own, and an operation without such an algorithm raises RuntimeError.
        cuDNN's attention, whose gradients have no fixed order, is not used. False for the fastest: cuDNN times its
        convolutions and keeps the best, so two runs of the same steps differ in the last bits.
    """
    if exact:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS refuses to be deterministic without
    cudnn.deterministic, cudnn.benchmark = exact, not exact
    cuda.enable_cudnn_sdp(not exact)
    torch.use_deterministic_algorithms(exact)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # or each empty() is filled


@functools.cache
def why_not_compiled(device_type: str) -> str:
    """Return why torch.compile fails on this machine, for want of a compiler or of a newer driver; empty if it works.

    It compiles a small function, once for each process: a few seconds.
    """
    try:
        torch.compile(lambda x: 2 * x + 1, fullgraph=True, dynamic=False)(torch.ones(8, device=device_type))
    except Exception as error:
        return one_line(error)
    return ""


@functools.cache
def keep_freed_memory() -> bool:
    """Keep freed CPU memory in the process instead of returning it to the kernel; return whether that worked.

    By default glibc returns large blocks to the system when they are freed and requests them again a moment later; the
    kernel then clears them page by page: some 17,000 page faults in a training step of unet-small. Other C libraries
    have no such setting.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is None:
        return False
    return bool(mallopt(M_MMAP_THRESHOLD, KEPT)) and bool(mallopt(M_TRIM_THRESHOLD, KEPT))


def single_threaded() -> None:
    """Limit OpenMP to one thread, for the calling thread only.

    For threads that run next to the training thread. GNU's OpenMP lets threads spin while they wait for work only if
    all pools of a process together have no more threads than the process has processors. With a second pool they
    sleep, and waking them for every operation made a training step of a small UNet 1.3 times as long.
    """
    torch.get_num_threads()  # or torch would set the number again at its first computation in this thread
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libgomp.so.1").omp_set_num_threads(1)


def allow_tf32(allowed: bool) -> None:
    """Allow or forbid TF32 for the whole process.

    TF32 rounds the inputs of float32 convolutions and matrix products to 10 bits of mantissa. PyTorch allows it in
    convolutions by default; diffscale forbids it except in a run with train.precision=tf32, so that features and
    samples do not depend on the kind of GPU. It has no effect on a CPU.
    """
    cuda.matmul.allow_tf32 = cudnn.allow_tf32 = allowed


@contextlib.contextmanager
def exact_float32() -> Iterator[None]:
    """Context in which float32 is computed exactly, without TF32."""
    before = cuda.matmul.allow_tf32, cudnn.allow_tf32
    allow_tf32(False)
    try:
        yield
    finally:
        cuda.matmul.allow_tf32, cudnn.allow_tf32 = before
