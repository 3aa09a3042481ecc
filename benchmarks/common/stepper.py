"""One network, its optimizer and one batch, to be stepped and timed: what the throughput benchmarks share."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from diffscale.training.numerics import Numerics, Precision, ReducePrecision, choose_numerics


@dataclass(frozen=True)
class Automatic:
    """The numeric choices of a run with default settings."""

    precision: Precision | Literal["auto"] = "auto"
    channels_last: bool | Literal["auto"] = "auto"
    compile: bool | Literal["auto"] = "auto"
    winograd: bool | Literal["auto"] = "auto"
    exact: bool = True
    reduce_precision: ReducePrecision = "fp32"


class Stepper:
    """`seconds(n)` is what n training steps take; `numerics` how they are computed: given, or chosen as a run would.

    build: gives a network (images (B, 3, S, S), noise level (B,)) → prediction. clock: "wall", or "cpu" for the time
    that this process computed, which on one thread is what an idle machine would show while others work on this one.
    """

    def __init__(
        self,
        build: Callable[[], nn.Module],
        side: int,
        batch: int,
        device: str,
        numerics: Numerics | None = None,
        asked: Automatic | None = None,
        clock: Literal["wall", "cpu"] = "wall",
    ) -> None:
        torch.manual_seed(0)
        self.clock = time.perf_counter if clock == "wall" else time.process_time
        self.device = torch.device(device)
        self.network = build().to(self.device)
        images = torch.randn(batch, 3, side, side, device=self.device)
        self.numerics = numerics or choose_numerics(self.network, self.device.type, asked or Automatic())
        self.numerics.prepare(self.network).train()
        self.images = self.numerics.order(images)
        self.noise = torch.linspace(0.01, 0.99, batch, device=self.device)
        self.optimizer = torch.optim.AdamW(self.network.parameters(), lr=1e-5, fused=True)

    def step(self) -> None:
        with self.numerics.autocast(self.device):
            prediction = self.network(self.images, self.noise)
        (prediction.float() - self.images).square().mean().backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def seconds(self, steps: int) -> float:
        self._wait()
        started = self.clock()
        for _ in range(steps):
            self.step()
        self._wait()
        return self.clock() - started

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
