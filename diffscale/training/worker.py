"""The loop that Ray Train runs on every worker: a session, and its outcome to the command."""

from __future__ import annotations

import logging
from typing import Any

import torch

from diffscale.config.experiment import Experiment
from diffscale.core.device import Cost
from diffscale.core.errors import UserError
from diffscale.data import ShardError
from diffscale.distributed.messages import OUTCOME, STOP, Channel, Notices
from diffscale.training.async_evaluation import hand_over
from diffscale.training.checkpoint.saver import StorageFailed
from diffscale.training.parallel import World
from diffscale.training.trainer import Session


def train_worker(config: dict[str, Any]) -> None:
    """The loop that Ray Train runs on every worker."""
    import ray.train

    context = ray.train.get_context()
    run_session(config, World(context.get_world_rank(), context.get_world_size(), device_of(config)))


def device_of(config: dict[str, Any]) -> torch.device:
    if torch.cuda.is_available() and config["gpu"]:
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def run_session(config: dict[str, Any], world: World) -> None:
    """A session of this rank, its notices and its outcome going to the command."""
    channel = Channel(config["launch"])
    stops = [channel] if config["stop_with"] is None else [channel, Channel(config["stop_with"])]
    experiment = Experiment.model_validate_json(config["experiment"])
    if channel.get(OUTCOME) is not None:  # a rank ended the run, and Ray Train starts the others again: nothing to do
        return
    logger, notices = logging.getLogger("diffscale"), Notices(channel, f"rank {world.rank}")
    logger.addHandler(notices)
    try:
        session = Session(
            experiment,
            config["run_folder"],
            world,
            Cost(*config["cost"]),
            channel,
            config["should_stop"],
            lambda: any(c.get(STOP) is not None for c in stops),
            (lambda images: hand_over(images, world.rank)) if config["evaluate_beside"] else None,
        )
        outcome = session.run()
    except (UserError, StorageFailed) as error:
        channel.put(OUTCOME, failure(error))
        if world.size > 1:  # the other ranks wait for this one: Ray Train ends them when it raises
            raise
        return
    finally:
        logger.removeHandler(notices)
    if world.rank == 0:
        channel.put(OUTCOME, outcome)


def failure(error: Exception) -> dict[str, Any]:
    """The outcome of a run that cannot go on, whatever is tried again."""
    if isinstance(error, UserError):
        reason = "data" if isinstance(error, ShardError) else "refused"
        return {"reason": reason, "error": error.fields()}
    return {"reason": "storage", "message": str(error)}
