"""The numbers that a step leaves for the host, which reads them when it needs them and not before."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

QUARTILES = 4

# Places in a step's statistics, float64. One collective call sums the first SUMMED over the workers.
CLOCK, STOP = 0, 1  # rank 0 alone fills them in
BY_QUARTILE = slice(2, 2 + 2 * QUARTILES)  # losses summed over samples, then counts of samples
LOSS_SUM = 2 + 2 * QUARTILES
SUMMED = LOSS_SUM + 1
GRAD_NORM, LOSS_SCALE = SUMMED, SUMMED + 1
MUST_BE_FINITE = slice(LOSS_SUM, GRAD_NORM + 1)
STATISTICS = SUMMED + 2


@dataclass(frozen=True)
class Step:
    """The result of one step, the same on every worker. Losses are means over the global batch."""

    images_seen: int
    loss: float
    quartile_sums: tuple[float, ...]  # loss summed over samples by quartile of the noise level, clean to noisy
    quartile_counts: tuple[float, ...]
    grad_norm: float
    lr: float
    skipped: bool  # loss or gradient was not finite, so nothing was updated
    overflow: bool  # fp16 alone: the gradient was too large for the loss scale, which was halved
    clock: float  # rank 0's clock in seconds
    stop: int  # rank 0's stop request (control.py); 0 for none


class Launched:
    """A step whose kernels were launched. On a GPU its statistics are on their way to pinned memory."""

    def __init__(self, statistics: Tensor, images_seen: int, global_batch: int, lr: float) -> None:
        """Begin the copy to the host.

        statistics: float64 (STATISTICS,) on the device; the next step may overwrite it
        images_seen: at the end of the step
        lr: learning rate of the step
        """
        self.images_seen, self.global_batch, self.lr = images_seen, global_batch, lr
        self._arrived: torch.cuda.Event | None = None
        if statistics.device.type == "cuda":
            self._host = torch.empty(STATISTICS, dtype=torch.float64, pin_memory=True)
            self._host.copy_(statistics, non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record()
        else:
            self._host = statistics.clone()

    def read(self) -> Step:
        """Wait for the step's end and return its result."""
        if self._arrived is not None:
            self._arrived.synchronize()
        values = self._host.tolist()
        loss_sum, grad_norm, scale = values[LOSS_SUM], values[GRAD_NORM], values[LOSS_SCALE]
        finite = math.isfinite(loss_sum) and math.isfinite(grad_norm)
        overflow = math.isfinite(loss_sum) and not finite and scale > 1
        by_quartile = values[BY_QUARTILE]
        return Step(
            images_seen=self.images_seen,
            loss=loss_sum / self.global_batch,
            quartile_sums=tuple(by_quartile[:QUARTILES]),
            quartile_counts=tuple(by_quartile[QUARTILES:]),
            grad_norm=grad_norm,
            lr=self.lr,
            skipped=not finite and not overflow,
            overflow=overflow,
            clock=values[CLOCK],
            stop=int(values[STOP]),
        )
