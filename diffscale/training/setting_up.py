"""What is settled once per run or process before the first step: how the run computes, and threads."""

from __future__ import annotations

import dataclasses
import json
import logging
import re
from typing import Any

import torch

from diffscale.config.experiment import Experiment
from diffscale.config.factory import build_model
from diffscale.core import storage
from diffscale.core.device import Cost, device_name
from diffscale.core.errors import UserError
from diffscale.data import Dataset
from diffscale.distributed.connect import gpus
from diffscale.kernels import compile as native
from diffscale.kernels import group_norm as norm_act
from diffscale.kernels.heap import keep_freed_memory
from diffscale.training.numerics import Numerics, choose_numerics, winograd_available
from diffscale.training.parallel import World

__all__ = ["Cost", "settle_numerics", "settle_process", "settled", "uses_gpu"]

log = logging.getLogger(__name__)


NUMERICS = "numerics.json"
_WITHOUT_BF16 = {"K80", "P4", "P100", "T4", "V100"}  # as Ray calls GPUs older than Ampere


def settled(experiment: Experiment, dataset: Dataset) -> Experiment:
    """The same experiment with every "auto" of its numerics replaced, so that its run_id says how it computes.

    Runs that were begun when "auto" was a measurement of the moment keep it: their folder holds what was chosen.
    """
    train = experiment.train
    if "auto" not in (train.precision, train.compile, train.channels_last, train.winograd):
        return experiment
    if storage.exists(storage.join(experiment.run_folder(dataset.content_hash), NUMERICS)):
        return experiment
    bf16 = None
    found = gpus() if uses_gpu(experiment) else None
    if found is not None:
        bf16 = _WITHOUT_BF16.isdisjoint(word for name in found for word in re.split("[ -]", name))
    with torch.device("meta"):
        model = build_model(experiment, dataset)
    chosen = choose_numerics(model, "cpu" if found is None else "cuda", train, bf16)
    return experiment.model_copy(update={"train": train.model_copy(update=dataclasses.asdict(chosen))})


def uses_gpu(experiment: Experiment) -> bool:
    """train.gpu, `auto` being whether the cluster has one."""
    wanted = experiment.train.gpu
    return bool(gpus()) if wanted == "auto" else bool(wanted)


def settle_process(threads: int, device: torch.device) -> None:
    """What holds for a worker's whole process: a fixed number of threads, since sums depend on it and other workers
    have the other cores; on the CPU, freed memory kept for the next tensors; on a GPU, convolutions whose gradients
    are summed in a fixed order, so that the same steps give the same weights there too."""
    torch.set_num_threads(threads)
    if device.type == "cpu":
        keep_freed_memory()
    else:
        torch.backends.cudnn.deterministic = True


def settle_numerics(experiment: Experiment, run_folder: str, dataset: Dataset, world: World) -> dict[str, Any]:
    """numerics.json of the run: read, or written now from the settings.

    Where the run began on another kind of device, or with compiled kernels that this machine lacks, it continues, but
    is marked: it will not be bit-identical. Raises UserError for Winograd's convolutions where there are none.
    """
    uri = storage.join(run_folder, NUMERICS)
    here = {"device": device_name(world.device), "kernels": native.available(norm_act.KERNEL)}
    if storage.exists(uri):
        stored = json.loads(storage.read_bytes(uri))
        if changed := [key for key, value in here.items() if stored.get(key, value) != value]:
            before = ", ".join(f"{key} {stored[key]}" for key in changed)
            now = ", ".join(f"{key} {here[key]}" for key in changed)
            log.warning("resumed with %s after starting with %s: results will not be bit-identical", now, before)
            stored |= {"bit_identical": False, **here}
            storage.write_bytes(uri, json.dumps(stored).encode())
        return stored
    train = settled(experiment, dataset).train
    chosen = Numerics(train.precision, train.channels_last, train.compile, train.winograd)  # type: ignore[arg-type]
    if chosen.winograd and not winograd_available(chosen.precision, world.device.type):
        raise UserError(
            setting="train.winograd",
            value=True,
            expected=f"a CPU and a C++ compiler; this is {here['device']} with train.precision={chosen.precision}",
            fix="train.winograd=auto",
        )
    stored = {"numerics": dataclasses.asdict(chosen), "bit_identical": True, **here}
    storage.write_bytes(uri, json.dumps(stored).encode())
    return stored
