"""Facts about a device: its name, its measured rate, its energy, and what its time costs."""

from __future__ import annotations

import time
from typing import Any

import torch


def synchronize(device: torch.device) -> None:
    """Wait until a GPU has finished its work; a CPU always has."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def matmul_rate(device: torch.device, precision: str, seconds: float = 0.2) -> float:
    """Measure the FLOP/s of a square matrix product: the denominator of MFU, on this device at this moment.

    precision: bf16, fp16, tf32 or fp32, the precision of training
    seconds: time that the measurement takes, after one product to warm up
    """
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision, torch.float32)
    side = 8192 if device.type == "cuda" else 768
    a = torch.randn(side, side, device=device, dtype=dtype)
    b = torch.randn(side, side, device=device, dtype=dtype)
    torch.mm(a, b)
    synchronize(device)
    count, best, started = 0, float("inf"), time.perf_counter()
    while time.perf_counter() - started < seconds or count < 3:
        begin = time.perf_counter()
        torch.mm(a, b)
        synchronize(device)
        best, count = min(best, time.perf_counter() - begin), count + 1
    return 2.0 * side**3 / best


def mfu(flops_per_image: float, images_per_second: float, devices: int, rate: float) -> float:
    """Return the model FLOPs utilisation: counted FLOP/s over the measured FLOP/s of the devices' matrix products.

    rate: FLOP/s of one device, from `matmul_rate`
    """
    return flops_per_image * images_per_second / (devices * rate)


class EnergyMeter:
    """Joules that one GPU has used since the meter was made, read from NVML."""

    def __init__(self, device: torch.device) -> None:
        self._handle: Any = None
        if device.type == "cuda":
            try:
                import pynvml  # import cost

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
        """Return the joules so far, or None if NVML is unavailable."""
        return None if self._handle is None else self._read() - self._start


def device_name(device: torch.device) -> str:
    """Return the marketing name of the GPU or of the processor."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = [line.split(":", 1)[1].strip() for line in file if line.startswith("model name")]
    except OSError:
        names = []
    return f"CPU {names[0]}" if names else "CPU"


def money(device_seconds: float, price_per_device_hour: float | None) -> float | None:
    """Return what the device-seconds cost, or None without a price."""
    return None if price_per_device_hour is None else device_seconds / 3600 * price_per_device_hour
