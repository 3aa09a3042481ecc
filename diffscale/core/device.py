"""What a run costs: parameters, multiply-adds, FLOPs, the device's real rate, energy and money.

FLOPs are counted by PyTorch's FlopCounterMode on the real model, not compiled and not checkpointed, on the meta device
with the mathematical attention (on a CPU's fused attention the counter sees 3.5 × the forward pass, DECISIONS 11). So
they are the same on every device and for every setting that does not change the network.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode


class Cost(NamedTuple):
    """Of one image. FLOPs are twice the multiply-adds."""

    parameters: int  # trainable
    forward_macs: float  # one forward pass
    flops_per_image: float  # one training step: forward, backward, and the extra pass of a model that carries state


def count_cost(build: Callable[[], nn.Module], resolution: int, channels: int, num_classes: int) -> Cost:
    """Counts on the meta device: `build` makes the model there, without memory or time for its weights."""
    with torch.device("meta"):
        model = build()
    model.train()
    if hasattr(model, "set_activation_checkpointing"):
        model.set_activation_checkpointing(False)  # type: ignore[operator]
    x = torch.empty(1, channels, resolution, resolution, device="meta")
    logsnr = torch.empty(1, device="meta")
    label = torch.empty(1, dtype=torch.int64, device="meta") if num_classes else None
    with sdpa_kernel(SDPBackend.MATH):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(x, logsnr, label)
        forward = counter.get_total_flops()
        with FlopCounterMode(display=False) as counter:
            prediction, _ = model(x, logsnr, label)
            prediction.sum().backward()
        training = counter.get_total_flops()
    if getattr(model, "carries_state", False):
        training += forward
    parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return Cost(parameters, forward / 2, float(training))


def matmul_rate(device: torch.device, precision: str, seconds: float = 0.2) -> float:
    """FLOP/s of a square matrix product in the precision of training: the denominator of MFU, measured here and now."""
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision, torch.float32)
    side = 8192 if device.type == "cuda" else 768
    a = torch.randn(side, side, device=device, dtype=dtype)
    b = torch.randn(side, side, device=device, dtype=dtype)
    torch.mm(a, b)
    _wait(device)
    count, best, started = 0, float("inf"), time.perf_counter()
    while time.perf_counter() - started < seconds or count < 3:
        begin = time.perf_counter()
        torch.mm(a, b)
        _wait(device)
        best, count = min(best, time.perf_counter() - begin), count + 1
    return 2.0 * side**3 / best


def mfu(flops_per_image: float, images_per_second: float, devices: int, rate: float) -> float:
    """Model FLOPs utilisation: counted FLOPs over what the devices' measured matmul rate would do in that time."""
    return flops_per_image * images_per_second / (devices * rate)


class EnergyMeter:
    """Joules that this machine's GPU has used since the meter was made, from NVML; None where that is not to be had."""

    def __init__(self, device: torch.device) -> None:
        self._handle: Any = None
        if device.type == "cuda":
            try:
                import pynvml

                pynvml.nvmlInit()
                uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
                self._nvml = pynvml
                self._handle = pynvml.nvmlDeviceGetHandleByUUID(uuid)
                self._start = self._read()
            except Exception:
                self._handle = None

    def _read(self) -> float:
        return self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle) / 1000

    def joules(self) -> float | None:
        return None if self._handle is None else self._read() - self._start


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = [line.split(":", 1)[1].strip() for line in file if line.startswith("model name")]
    except OSError:
        names = []
    return f"CPU {names[0]}" if names else "CPU"


def money(device_seconds: float, price_per_device_hour: float | None) -> float | None:
    return None if price_per_device_hour is None else device_seconds / 3600 * price_per_device_hour


def memory_estimate(cost: Cost, averages: int, resolution: int, channels: int, micro_batch: int) -> float:
    """Bytes of weights, gradients, two optimizer moments and averages, without activations."""
    return 4.0 * cost.parameters * (4 + averages) + 4.0 * micro_batch * channels * resolution**2 * 4


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
