"""OpenMP's pools of threads: one for each process that computes."""

from __future__ import annotations

import contextlib
import ctypes

import torch


def one_thread_here() -> None:
    """Let the calling thread do alone what torch would share among threads, now and later. Others are not affected.

    For threads beside the one that trains: GNU's OpenMP lets threads that wait for work spin only while all pools of a
    process together have no more threads than it has processors. With a second pool they sleep instead, and being woken
    for every operation made a training step of a small UNet 1.3 times as long.
    """
    torch.get_num_threads()  # or torch would set the number once more when it first computes here
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libgomp.so.1").omp_set_num_threads(1)
