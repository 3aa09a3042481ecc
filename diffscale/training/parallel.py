"""Several workers: shares of the batch, gradients reduced in a fixed order, and FSDP2.

DistributedDataParallel rebuilds its buckets after the first step, so a resumed run sums in another order on three or
more ranks and its result differs in the last bits. Here the parameters alone determine the layout, so the same ranks
always add in the same order.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from diffscale.data.loading import even_share

BUCKET_BYTES = 25 << 20


@dataclass(frozen=True)
class World:
    """This worker's rank among all workers. A single worker needs no process group."""

    rank: int = 0
    size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def share(self, global_batch: int) -> tuple[int, int]:
        """Return the first and last (exclusive) place of this worker's share of each global batch."""
        return even_share(global_batch, self.rank, self.size)

    def sum(self, values: Tensor) -> Tensor:
        """Sum over all workers, in place."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def from_first(self, value: Any) -> Any:
        """Return rank 0's value on every rank."""
        if self.size == 1:
            return value
        box = [value if self.rank == 0 else None]
        dist.broadcast_object_list(box, src=0, device=self.device if self.device.type == "cuda" else None)
        return box[0]

    def gather(self, value: Any) -> list[Any]:
        """Return every rank's value on every rank."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.size > 1:
            dist.barrier()


def passes(global_batch: int, size: int, micro_batch: int | None) -> int:
    """Return the passes per step on every worker: the number that the largest share needs."""
    largest = -(-global_batch // size)
    return -(-largest // (micro_batch or largest))


class Gradients(Protocol):
    """Gradients of one step, replicated or sharded."""

    def begin(self) -> None:
        """Set the gradients to zero."""

    def expect(self, last: bool) -> None:
        """Announce a backward pass. After the last one of a step the gradients are summed over workers."""

    def finish(self) -> Tensor:
        """Wait for the sum and return its norm, a scalar."""

    def scale(self, factor: float) -> None:
        """Multiply the gradients by a factor."""


class FlatGradients:
    """Gradients as views of one buffer, in the reverse order of the parameters.

    Buckets of 25 MiB are summed over workers in this order while the backward pass computes the next ones.
    """

    def __init__(self, model: nn.Module, world: World) -> None:
        self.world = world
        self.parameters = [p for p in model.parameters() if p.requires_grad][::-1]
        total = sum(p.numel() for p in self.parameters)
        self.flat = torch.zeros(total, dtype=torch.float32, device=world.device)
        self.views: list[Tensor] = []
        self.buckets: list[Tensor] = []
        self._bucket_of: list[int] = []
        start = bucket_start = 0
        for p in self.parameters:
            self.views.append(self._view(p, start))
            self._bucket_of.append(len(self.buckets))
            start += p.numel()
            if (start - bucket_start) * 4 >= BUCKET_BYTES:
                self.buckets.append(self.flat[bucket_start:start])
                bucket_start = start
        if start > bucket_start:
            self.buckets.append(self.flat[bucket_start:start])
        self._sizes = [self._bucket_of.count(i) for i in range(len(self.buckets))]
        self._missing: list[int] = []
        self._works: list[Any] = []
        self._armed = False
        if world.size > 1:
            for p, bucket in zip(self.parameters, self._bucket_of, strict=True):
                p.register_post_accumulate_grad_hook(lambda _, b=bucket: self._ready(b))

    def _view(self, p: nn.Parameter, start: int) -> Tensor:
        flat = self.flat[start : start + p.numel()]
        dense = p.is_contiguous() or p.is_contiguous(memory_format=torch.channels_last)
        return flat.as_strided(p.shape, p.stride()) if dense and p.ndim == 4 else flat.view(p.shape)

    def begin(self) -> None:
        self.flat.zero_()
        for p, view in zip(self.parameters, self.views, strict=True):
            p.grad = view

    def expect(self, last: bool) -> None:
        self._armed = last and self.world.size > 1
        self._missing = list(self._sizes)
        self._works = []

    def _ready(self, bucket: int) -> None:
        if self._armed:
            self._missing[bucket] -= 1
            while len(self._works) < len(self.buckets) and self._missing[len(self._works)] <= 0:
                self._sum_next()

    def _sum_next(self) -> None:
        self._works.append(dist.all_reduce(self.buckets[len(self._works)], async_op=True))

    def finish(self) -> Tensor:
        if self.world.size > 1:
            while len(self._works) < len(self.buckets):  # of parameters that this step did not use
                self._sum_next()
            for work in self._works:
                work.wait()
            self._armed = False
        return torch.linalg.vector_norm(self.flat)

    def scale(self, factor: float) -> None:
        self.flat.mul_(factor)


class ShardedGradients:
    """Gradients that FSDP2 sums and scatters."""

    def __init__(self, model: nn.Module, world: World) -> None:
        self.model, self.world = model, world

    def _all(self) -> list[Tensor]:
        return [p.grad for p in self.model.parameters() if p.grad is not None]

    def begin(self) -> None:
        for p in self.model.parameters():
            p.grad = None

    def expect(self, last: bool) -> None:
        self.model.set_requires_gradient_sync(last)  # type: ignore[operator]

    def finish(self) -> Tensor:
        squares = torch.zeros((), dtype=torch.float64, device=self.world.device)
        for grad in self._all():
            squares += grad.to_local().double().square().sum()  # type: ignore[attr-defined]
        return self.world.sum(squares).sqrt().float()

    def scale(self, factor: float) -> None:
        for grad in self._all():
            grad.to_local().mul_(factor)  # type: ignore[attr-defined]


def shard(model: nn.Module, world: World, precision: str) -> nn.Module:
    """Apply FSDP2 to the model's blocks, in place, and return the model. Gradients are sums, as with `FlatGradients`.

    With bf16 on CUDA, parameters are gathered and computed with in bf16, and gradients are reduced in float32.
    Elsewhere both stay float32 under autocast, so that FSDP2 computes what replicated workers compute.
    """
    from torch.distributed.device_mesh import init_device_mesh  # import cost
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard  # import cost

    low = precision == "bf16" and world.device.type == "cuda"
    policy = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if low else None, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    mesh = init_device_mesh(world.device.type, (world.size,))
    blocks: list[nn.Module] = model.blocks_for_fsdp() if hasattr(model, "blocks_for_fsdp") else []  # type: ignore[operator]
    for block in blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    for module in model.modules():
        if hasattr(module, "set_gradient_divide_factor"):
            module.set_gradient_divide_factor(1.0)  # type: ignore[operator]
            if world.device.type != "cuda":
                module.set_force_sum_reduction_for_comms(True)  # type: ignore[operator]
    return model
