"""Whether the passes of a run fit its GPU: told before the first step, and what `train.micro_batch: auto` becomes."""

from __future__ import annotations

import json
import logging

import torch

from diffscale.config.experiment import Experiment
from diffscale.core import storage
from diffscale.core.errors import UserError
from diffscale.core.text import gigabytes
from diffscale.data import Dataset
from diffscale.preflight.memory import estimate, largest_micro_batch
from diffscale.training.parallel import World

log = logging.getLogger(__name__)

# The estimate is counted on a CPU, which keeps scores of attention that a GPU's kernels do not: too high, by a third.
CERTAIN = 1.5
FILE = "micro_batch.json"  # in the run's folder: the most images per pass, after a pass did not fit


def fitted(
    experiment: Experiment, dataset: Dataset, world: World, run_folder: str, memory: int | None = None
) -> Experiment:
    """Return the experiment with a number for `train.micro_batch: auto`: passes of one size that fit every GPU.

    On a CPU "auto" is the whole share of a worker. All ranks call this and get the same number. Raises UserError if a
    pass cannot fit: what it keeps for its backward pass is far more than the memory of the GPU. Between, and for a
    compiled network, which keeps less, there is a warning.

    memory: bytes of this rank's device; None asks the device
    """
    train = experiment.train
    if memory is None and world.device.type == "cuda":
        memory = torch.cuda.get_device_properties(world.device).total_memory
    if memory is None:
        return _with(experiment, None) if train.micro_batch == "auto" else experiment
    share, holders = -(-train.global_batch // world.size), world.holders(train.parallel)
    if train.micro_batch != "auto":
        needed = estimate(experiment, dataset, overhead=1.0, holders=holders).total
        if needed > CERTAIN * memory and not train.compile:
            raise _does_not_fit(experiment, dataset, memory, holders)
        if needed > memory and world.rank == 0:
            log.warning(
                "a worker may need %s of the %s of its GPU: a smaller train.micro_batch, or auto, needs less",
                gigabytes(needed),
                gigabytes(memory),
            )
        return experiment
    fitting = largest_micro_batch(experiment, dataset, memory, holders)
    most = min(world.gather(min(fitting, _stored(run_folder), share)))
    if most < 1:
        raise _does_not_fit(experiment, dataset, memory, holders)
    passes = -(-share // most)
    return _with(experiment, -(-share // passes))


def after_out_of_memory(
    requested: Experiment, used: Experiment, dataset: Dataset, world: World, run_folder: str
) -> None:
    """Note that passes were too large, so that the next attempt of an automatic run takes half as many images.

    Ray Train makes that attempt when the worker raises. Raises UserError for a run whose number was given.

    requested: with the setting as it was given
    used: with the number that was used
    """
    if requested.train.micro_batch == "auto" and used.train.micro_batch not in (None, "auto", 1):
        most = int(used.train.micro_batch) // 2
        storage.write_bytes(storage.join(run_folder, FILE), json.dumps({"most": most}).encode())
        log.warning("out of memory with train.micro_batch=%s: the next attempt takes %d", used.train.micro_batch, most)
        return
    memory = torch.cuda.get_device_properties().total_memory if torch.cuda.is_available() else 0
    raise _does_not_fit(used, dataset, memory, world.holders(used.train.parallel))


def _stored(run_folder: str) -> int:
    uri = storage.join(run_folder, FILE)
    return int(json.loads(storage.read_bytes(uri))["most"]) if storage.exists(uri) else 1 << 31


def _with(experiment: Experiment, micro_batch: int | None) -> Experiment:
    return experiment.model_copy(update={"train": experiment.train.model_copy(update={"micro_batch": micro_batch})})


def _does_not_fit(experiment: Experiment, dataset: Dataset, memory: int, holders: int) -> UserError:
    needed = estimate(experiment, dataset, holders=holders).total
    largest = largest_micro_batch(experiment, dataset, memory, holders)
    helps = "train.activation_checkpointing=true, train.parallel=fsdp2 on several GPUs, or a smaller model"
    return UserError(
        setting="train.micro_batch",
        value=experiment.train.micro_batch,
        expected=f"at most about {largest} images per pass" if largest else "a network that fits this GPU",
        reason=f"a worker needs about {gigabytes(needed)}, the GPU has {gigabytes(memory)}",
        fix=f"train.micro_batch={largest}, or {helps}" if largest else helps,
    )
