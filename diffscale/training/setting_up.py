"""What is settled once per run or process before the first step: threads, and how the run computes."""

from __future__ import annotations

import dataclasses
import json
import logging
from typing import Any

import torch
from torch import nn

from diffscale import storage
from diffscale.compute import Cost, device_name
from diffscale.data import Dataset
from diffscale.experiment import Experiment
from diffscale.heap import keep_freed_memory
from diffscale.training.numerics import choose_numerics
from diffscale.training.parallel import World, passes
from diffscale.training.plan import Plan

__all__ = ["Cost", "settle_numerics", "settle_process"]

log = logging.getLogger(__name__)


def settle_process(threads: int, device: torch.device) -> None:
    """What holds for a worker's whole process: a fixed number of threads, since sums depend on it and other workers
    have the other cores; on the CPU, freed memory kept for the next tensors; on a GPU, convolutions whose gradients
    are summed in a fixed order, so that the same steps give the same weights there too."""
    torch.set_num_threads(threads)
    if device.type == "cpu":
        keep_freed_memory()
    else:
        torch.backends.cudnn.deterministic = True


def settle_numerics(
    experiment: Experiment, run_folder: str, model: nn.Module, dataset: Dataset, world: World, plan: Plan
) -> dict[str, Any]:
    """numerics.json of the run: read, or chosen now and written. On another kind of device than the one that it was
    chosen on the run goes on, but is marked: it will not be bit-identical (DECISIONS 10)."""
    uri = storage.join(run_folder, "numerics.json")
    here = device_name(world.device)
    if storage.exists(uri):
        stored = json.loads(storage.read_bytes(uri))
        if stored["device"] != here:
            log.warning("began on %s, goes on on %s: not bit-identical from here on", stored["device"], here)
            stored |= {"bit_identical": False, "device": here}
            storage.write_bytes(uri, json.dumps(stored).encode())
        return stored
    train = experiment.train
    batch = train.micro_batch or -(-train.global_batch // world.size)
    example = torch.zeros(batch, dataset.channels, dataset.resolution, dataset.resolution, device=world.device)
    steps = None
    if plan.end is not None:
        steps = plan.end // train.global_batch * passes(train.global_batch, world.size, train.micro_batch)
    chosen = choose_numerics(model, example, world.device, train, steps=steps)
    stored = {"numerics": dataclasses.asdict(chosen), "device": here, "bit_identical": True}
    storage.write_bytes(uri, json.dumps(stored).encode())
    return stored
