"""How Ray Train's workers join a torch process group, importable without torch.

Ray's own TorchConfig imports torch in the controller, which holds no tensor. Every start would wait 3 s for the import,
since the controller starts before the workers. Remove this module when Ray's TorchConfig imports torch lazily.
"""

from __future__ import annotations

import gc
import os
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import ray
import ray.train
from ray.train.backend import Backend, BackendConfig

COLLECTIVE_SECONDS = 1800  # Ray's default; training/control.py notices a rank that hangs long before
LEAVING_SECONDS = 30


@dataclass
class ProcessGroupConfig(BackendConfig):
    """The process group that replaces ray.train.torch.TorchConfig."""

    backend: str  # gloo or nccl

    @property
    def backend_cls(self) -> type[ProcessGroup]:
        return ProcessGroup

    @property
    def train_func_context(self) -> Any:
        from ray.train.torch.config import TorchConfigContextManager  # import cost; it sets the current CUDA device

        return TorchConfigContextManager

    def to_dict(self) -> dict[str, Any]:
        return {"backend": self.backend}


class ProcessGroup(Backend):
    """Starts and ends the process group from the controller; the functions below run on the workers."""

    share_cuda_visible_devices = True

    def on_start(self, worker_group: Any, backend_config: BackendConfig) -> None:
        address, port = worker_group.execute_single(0, _meeting_point)
        worker_group.execute(_join, backend_config.to_dict()["backend"], address, port)

    def on_shutdown(self, worker_group: Any, backend_config: BackendConfig) -> None:
        ray.wait(worker_group.execute_async(_leave), num_returns=len(worker_group), timeout=LEAVING_SECONDS)


def _meeting_point() -> tuple[str, int]:
    """Return address and free port of rank 0.

    The function of Ray is private: it finds the address by which the other nodes reach this one, as TorchConfig does,
    and saves a copy of its code. It can go with this module.
    """
    from ray.train._internal.utils import get_address_and_port  # import cost

    return get_address_and_port()


def _join(backend: str, address: str, port: int) -> None:
    """Join the group, with the environment variables of torchrun, which libraries read.

    Python's garbage collector is off from here on, since imports make it run often and in vain: an eighth of a
    worker's processor time until its first step. The function that trains switches it on.
    """
    gc.disable()
    import torch.distributed as dist  # import cost

    context = ray.train.get_context()
    rank, size = context.get_world_rank(), context.get_world_size()
    os.environ |= {
        "MASTER_ADDR": address,
        "MASTER_PORT": str(port),
        "RANK": str(rank),
        "WORLD_SIZE": str(size),
        "LOCAL_RANK": str(context.get_local_rank()),
        "LOCAL_WORLD_SIZE": str(context.get_local_world_size()),
        "NODE_RANK": str(context.get_node_rank()),
    }
    dist.init_process_group(
        backend, init_method="env://", rank=rank, world_size=size, timeout=timedelta(seconds=COLLECTIVE_SECONDS)
    )


def _leave() -> None:
    import torch.distributed as dist  # import cost

    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.destroy_process_group()
