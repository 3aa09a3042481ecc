"""Several workers: shares of the batch, gradients reduced in a fixed order, and FSDP2.

DistributedDataParallel rebuilds its buckets after the first step, so a resumed run sums in another order on three or
more ranks and its result differs in the last bits. Here the parameters alone determine the layout, so the same ranks
always add in the same order.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from diffscale.core.errors import UserError
from diffscale.data.loading import even_share
from diffscale.training.checkpoint.state import is_sharded, local_shard
from diffscale.training.flat import flat_like

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

BUCKET_BYTES = 25 << 20
FIRST_BUCKET_BYTES = 1 << 20  # so that the sum over workers begins early in the backward pass


@dataclass(frozen=True)
class World:
    """This worker's rank among all workers. A single worker needs no process group.

    node_rank, node_size: its rank among the workers of its node, and their number
    """

    rank: int = 0
    size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    node_rank: int = 0
    node_size: int = 1

    def share(self, global_batch: int) -> tuple[int, int]:
        """Return the first and last (exclusive) place of this worker's share of each global batch."""
        return even_share(global_batch, self.rank, self.size)

    def holders(self, parallel: str) -> int:
        """Return how many workers, from rank 0 on, hold all weights together. parallel: `train.parallel`."""
        return {"ddp": 1, "fsdp2": self.size, "hsdp": self.node_size}[parallel]

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

    def to_first(self, value: Any) -> list[Any]:
        """Return every rank's value on rank 0, and an empty list on the others."""
        if self.size == 1:
            return [value]
        values: list[Any] | None = [None] * self.size if self.rank == 0 else None
        dist.gather_object(value, values)
        return values or []

    def broadcast(self, tensor: Tensor, source: int = 0) -> None:
        """Replace a tensor on the device by that of a rank, in place."""
        if self.size > 1:
            dist.broadcast(tensor, src=source)

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
        """Forget the gradients of the step before."""

    def expect(self, last: bool) -> None:
        """Announce a backward pass. After the last one of a step the gradients are summed over workers."""

    def collect(self) -> None:
        """Take over the gradients of a backward pass that has ended, and wait for their sum after the last one."""

    def finish(self) -> Tensor:
        """Return the norm of the sum, a scalar. The parameters have their gradients from then on."""

    def scale(self, factor: Tensor) -> None:
        """Multiply the gradients by a factor, float32 ()."""


class FlatGradients:
    """Gradients as views of one buffer, in the reverse order of the parameters.

    Autograd leaves each gradient where it made it, and those of a bucket of 25 MiB are moved into the buffer together:
    adding each to the buffer would launch one kernel for every parameter. Buckets are summed over workers in this order
    while the backward pass computes the next ones.
    """

    def __init__(self, model: nn.Module, world: World, reduced_in: torch.dtype = torch.float32) -> None:
        """reduced_in: dtype in which buckets are sent and summed"""
        self.world, self._reduced_in = world, reduced_in
        self.parameters = [p for p in model.parameters() if p.requires_grad][::-1]
        self.flat, self.views = flat_like(self.parameters)
        ends, start, full = [], 0, FIRST_BUCKET_BYTES
        for i, p in enumerate(self.parameters):
            start += 4 * p.numel()
            if start >= full or i == len(self.parameters) - 1:
                ends.append(i + 1)
                full = start + BUCKET_BYTES
        self._ranges = [slice(first, last) for first, last in zip([0, *ends], ends, strict=False)]
        sizes = [sum(p.numel() for p in self.parameters[part]) for part in self._ranges]
        self.buckets = self.flat.split(sizes)
        self._missing: list[int] = []
        self._works: list[
            tuple[Any, Tensor] | None
        ] = []  # of the buckets that were moved: their sums, if there are any
        self._first = self._last = True
        self._sources: list[nn.Parameter] = self.parameters
        self._watch(self.parameters)

    def read_from(self, copies: Mapping[nn.Parameter, nn.Parameter]) -> None:
        """Take the gradients of some parameters from copies of them, which may have another dtype."""
        self._sources = [copies.get(p, p) for p in self.parameters]
        self._watch([copies.get(p) for p in self.parameters])

    def _watch(self, sources: Sequence[nn.Parameter | None]) -> None:
        """Notice, among several workers, when autograd has made the gradients of these."""
        if self.world.size > 1:
            for i, part in enumerate(self._ranges):
                for source in sources[part]:
                    if source is not None:
                        source.register_post_accumulate_grad_hook(lambda _, bucket=i: self._ready(bucket))

    def begin(self) -> None:
        for p in self._sources:
            p.grad = None
        self._first = True

    def expect(self, last: bool) -> None:
        self._last = last
        self._missing = [part.stop - part.start for part in self._ranges]
        self._works = []

    def _ready(self, bucket: int) -> None:
        """Count a gradient of a bucket; move those of complete buckets, in order, and begin their sum."""
        self._missing[bucket] -= 1
        while len(self._works) < len(self.buckets) and self._missing[len(self._works)] <= 0:
            self._move_next()

    def _move_next(self) -> None:
        bucket = len(self._works)
        part = self._ranges[bucket]
        found: dict[torch.dtype, tuple[list[Tensor], list[Tensor]]] = {}  # fused copies take one dtype at a time
        for source, view in zip(self._sources[part], self.views[part], strict=True):
            if source.grad is not None:
                views, grads = found.setdefault(source.grad.dtype, ([], []))
                views.append(view)
                grads.append(source.grad)
                source.grad = None
        if self._first and sum(len(views) for views, _ in found.values()) < part.stop - part.start:
            self.buckets[bucket].zero_()  # the step does not use all of them
        for views, grads in found.values():
            (torch._foreach_copy_ if self._first else torch._foreach_add_)(views, grads)
        if self._last and self.world.size > 1:
            sent = self.buckets[bucket].to(self._reduced_in)
            self._works.append((dist.all_reduce(sent, async_op=True), sent))
        else:
            self._works.append(None)

    @torch.no_grad()
    def collect(self) -> None:
        while len(self._works) < len(self.buckets):
            self._move_next()
        for bucket, begun in zip(self.buckets, self._works, strict=True):
            if begun is not None:
                work, summed = begun
                work.wait()  # here, because a recorded pass must end with what it began
                if summed is not bucket:
                    bucket.copy_(summed)
        self._first = False

    def finish(self) -> Tensor:
        for p, view in zip(self.parameters, self.views, strict=True):
            p.grad = view
        return torch.linalg.vector_norm(self.flat)

    def scale(self, factor: Tensor) -> None:
        self.flat.mul_(factor)


class ShardedGradients:
    """Gradients that FSDP2 sums and scatters."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        mesh = next(p.device_mesh for p in model.parameters() if is_sharded(p))
        self._group = mesh.get_group(mesh.ndim - 1)  # the workers that hold different parts

    def _all(self) -> list[Tensor]:
        return [local_shard(p.grad) for p in self.model.parameters() if p.grad is not None]

    def begin(self) -> None:
        for p in self.model.parameters():
            p.grad = None

    def expect(self, last: bool) -> None:
        self.model.set_requires_gradient_sync(last)  # type: ignore[operator]

    def collect(self) -> None:
        pass

    def finish(self) -> Tensor:
        norms = torch.stack(torch._foreach_norm(self._all(), dtype=torch.float64))
        square = norms.square().sum()
        dist.all_reduce(square, group=self._group)
        return square.sqrt().float()

    def scale(self, factor: Tensor) -> None:
        torch._foreach_mul_(self._all(), factor)


def shard(
    model: nn.Module,
    world: World,
    precision: str,
    *,
    within_nodes: bool = False,
    reduced_in: torch.dtype = torch.float32,
) -> nn.Module:
    """Apply FSDP2 to the model's blocks, in place, and return the model. Gradients are sums, as with `FlatGradients`.

    With bf16 on CUDA, parameters are gathered and computed with in bf16. Elsewhere they stay float32 under autocast,
    so that FSDP2 computes what replicated workers compute. The weights of a block are gathered while the one before it
    computes, in both directions.

    precision: of the matrix products
    within_nodes: each node has all weights (HSDP): they are gathered within it, and only gradients cross the network
    reduced_in: dtype in which gradients are sent and summed

    Raises UserError for nodes with different numbers of workers.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard  # import cost

    low = precision == "bf16" and world.device.type == "cuda"
    policy = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if low else None, reduce_dtype=reduced_in, cast_forward_inputs=False
    )
    mesh = _mesh(world, within_nodes)
    blocks: list[Any] = model.blocks_for_fsdp() if hasattr(model, "blocks_for_fsdp") else []  # type: ignore[operator]
    for block in blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    for block, following in itertools.pairwise(blocks):
        block.set_modules_to_forward_prefetch([following])
        following.set_modules_to_backward_prefetch([block])
    for module in model.modules():
        if hasattr(module, "set_gradient_divide_factor"):
            module.set_gradient_divide_factor(1.0)  # type: ignore[operator]
            if world.device.type != "cuda":
                module.set_force_sum_reduction_for_comms(True)  # type: ignore[operator]
    return model


def _mesh(world: World, within_nodes: bool) -> DeviceMesh:
    """Return all workers in a line, or in rows of those of a node."""
    from torch.distributed.device_mesh import init_device_mesh  # import cost

    kind = world.device.type
    if not within_nodes or world.node_size == world.size:
        return init_device_mesh(kind, (world.size,))
    counts = sorted(set(world.gather(world.node_size)))
    if len(counts) > 1:
        raise UserError(
            setting="train.parallel",
            value="hsdp",
            expected="equally many workers on every node",
            reason=f"the nodes have {' or '.join(map(str, counts))} workers",
            fix="train.parallel=fsdp2",
        )
    shape = world.size // world.node_size, world.node_size
    return init_device_mesh(kind, shape, mesh_dim_names=("nodes", "workers"))
