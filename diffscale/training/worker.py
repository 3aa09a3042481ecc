"""The function that every worker of a run executes: one Trainer, whose outcome rank 0 sends to the command.

Ray Train starts the workers again after any exception. An exception that would come again must therefore not reach it:
it becomes the outcome of the run (`training/failures.py`).
"""

from __future__ import annotations

import gc
import logging
from typing import Any

import torch

from diffscale.distributed.messages import OUTCOME, STOP, Messages, Notices
from diffscale.training.async_evaluation import submit
from diffscale.training.failures import outcome_of
from diffscale.training.parallel import World
from diffscale.training.spec import RunSpec
from diffscale.training.trainer import Trainer


def train_worker(config: dict[str, Any], world: World | None = None) -> None:
    """Train on this rank to the end of the launch.

    config: "spec", a RunSpec as JSON, and "should_stop", which may be None
    world: this rank; None asks Ray Train
    """
    spec = RunSpec.from_json(config["spec"])
    world = world or _ray_world(spec.gpu)
    messages = Messages(spec.launch)
    if messages.get(OUTCOME) is not None:  # a rank ended the run, and Ray Train restarted the others
        return
    stops = [messages] if spec.stop_with is None else [messages, Messages(spec.stop_with)]
    logger, notices = logging.getLogger("diffscale"), Notices(messages, f"rank {world.rank}", among_many=world.rank > 0)
    logger.addHandler(notices)
    trainer = None
    try:
        trainer = Trainer(
            spec.experiment,
            spec.run_folder,
            world,
            spec.cost,
            messages,
            should_stop=config["should_stop"],
            stop_requested=lambda: any(m.get(STOP) is not None for m in stops),
            content_hash=spec.content_hash,
            submit=(lambda images: submit(images, world.rank)) if spec.evaluate_async else None,
        )
        gc.enable()  # off since the worker joined its group, for the imports
        outcome = trainer.run()
    except Exception as error:
        position = None if trainer is None else trainer.learner.images_seen
        failure = outcome_of(error, spec.run_folder, world.rank, position)
        if failure is None:
            raise
        messages.put(OUTCOME, failure.to_json())
        if world.size > 1:  # the other ranks wait for this one; Ray Train ends them when it raises
            raise
        return
    finally:
        logger.removeHandler(notices)
    if world.rank == 0:
        messages.put(OUTCOME, outcome.to_json())


def device_of(gpu: bool) -> torch.device:
    """Return the device that a worker trains on."""
    if torch.cuda.is_available() and gpu:
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def _ray_world(gpu: bool) -> World:
    import ray.train  # import cost

    context = ray.train.get_context()
    return World(
        context.get_world_rank(),
        context.get_world_size(),
        device_of(gpu),
        context.get_local_rank(),
        context.get_local_world_size(),
    )
