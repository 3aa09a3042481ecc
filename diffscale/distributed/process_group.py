"""How Ray Train's workers join a torch process group, importable without torch.

Ray's own TorchConfig imports torch in the controller, which has no tensor: 3 s that every start would wait for, since
the controller comes before the workers.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import ray
from ray.train.backend import Backend, BackendConfig

COLLECTIVE_SECONDS = 1800  # Ray's; a rank that hangs is noticed by health.py long before
LEAVING_SECONDS = 30


@dataclass
class ProcessGroupConfig(BackendConfig):
    """In the place of ray.train.torch.TorchConfig. backend: gloo or nccl."""

    backend: str

    @property
    def backend_cls(self) -> type[ProcessGroup]:
        return ProcessGroup

    @property
    def train_func_context(self) -> Any:
        from ray.train.torch.config import TorchConfigContextManager  # sets the current CUDA device

        return TorchConfigContextManager

    def to_dict(self) -> dict[str, Any]:
        return {"backend": self.backend}


class ProcessGroup(Backend):
    """Runs in the controller; the functions below run on the workers."""

    share_cuda_visible_devices = True

    def on_start(self, worker_group: Any, backend_config: BackendConfig) -> None:
        address, port = worker_group.execute_single(0, _meeting_point)
        worker_group.execute(_join, backend_config.to_dict()["backend"], address, port)

    def on_shutdown(self, worker_group: Any, backend_config: BackendConfig) -> None:
        ray.wait(worker_group.execute_async(_leave), num_returns=len(worker_group), timeout=LEAVING_SECONDS)


def _meeting_point() -> tuple[str, int]:
    from ray.train._internal.utils import get_address_and_port

    return get_address_and_port()


def _join(backend: str, address: str, port: int) -> None:
    """The variables are those of torchrun, which libraries look for."""
    from datetime import timedelta

    import ray.train
    import torch.distributed as dist

    context = ray.train.get_context()
    rank, size = context.get_world_rank(), context.get_world_size()
    os.environ |= {
        "MASTER_ADDR": address, "MASTER_PORT": str(port), "RANK": str(rank), "WORLD_SIZE": str(size),
        "LOCAL_RANK": str(context.get_local_rank()), "LOCAL_WORLD_SIZE": str(context.get_local_world_size()),
        "NODE_RANK": str(context.get_node_rank()),
    }  # fmt: skip
    dist.init_process_group(
        backend, init_method="env://", rank=rank, world_size=size, timeout=timedelta(seconds=COLLECTIVE_SECONDS)
    )


def _leave() -> None:
    import torch.distributed as dist

    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.destroy_process_group()
