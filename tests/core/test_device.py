"""Facts about this device."""

from __future__ import annotations

import pytest
import torch

from diffscale.core.device import EnergyMeter, device_name, matmul_rate, mfu, money, synchronize

CPU = torch.device("cpu")


def test_rates_and_prices() -> None:
    assert matmul_rate(CPU, "fp32", seconds=0.01) > 1e8
    assert mfu(1e9, 10.0, 2, 1e10) == 0.5
    assert money(7200.0, 1.5) == 3.0
    assert money(7200.0, None) is None


def test_a_processor_has_a_name_and_no_energy() -> None:
    assert device_name(CPU).startswith("CPU")
    assert EnergyMeter(CPU).joules() is None
    synchronize(CPU)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_has_a_name() -> None:
    assert device_name(torch.device("cuda", 0))
