"""Evaluates one checkpoint in a separate process while training continues."""

from __future__ import annotations

import logging
import time
from typing import Any

import torch

from diffscale.config.experiment import Experiment
from diffscale.core import storage
from diffscale.distributed.messages import EVALUATED, Messages, Notices
from diffscale.kernels.runtime import configure_process
from diffscale.training.checkpoint import layout as ck
from diffscale.training.checkpoint_evaluation import CheckpointEvaluator
from diffscale.training.load import load_trained
from diffscale.training.metrics_log import summary
from diffscale.training.own_records import evaluated_points
from diffscale.training.parallel import World
from diffscale.training.spec import TASK_GPU
from diffscale.training.trackers import TrackedRun, kind_of, make_trackers

CHECKPOINT_WAIT_SECONDS = 600.0


def evaluate_images(config: dict[str, Any], images_seen: int) -> dict[str, float]:
    """Evaluate the checkpoint at `images_seen` and report its values to the command. config: that of the workers."""
    channel = Messages(config["launch"])
    logger, notices = logging.getLogger("diffscale"), Notices(channel, "evaluation")
    logger.addHandler(notices)
    try:
        return _evaluate(channel, config, images_seen)
    except Exception as error:
        logger.warning("the evaluation at %d images failed: %s", images_seen, error)
        raise
    finally:
        logger.removeHandler(notices)


def _evaluate(channel: Messages, config: dict[str, Any], images_seen: int) -> dict[str, float]:
    experiment, run_folder = Experiment.model_validate_json(config["experiment"]), config["run_folder"]
    if images_seen in evaluated_points(run_folder, experiment):  # by an earlier attempt
        return {}
    device = torch.device("cuda" if config["gpu"] else "cpu")
    configure_process(experiment.train.cpus_per_worker, device)
    trained = load_trained(_complete(run_folder, images_seen), experiment.eval.ema, experiment)
    devices, options = experiment.eval.devices or 1, dict[str, Any]()
    if devices > 1:
        options = {"actors": devices, "actor_gpu": 1 - TASK_GPU, "actor_threads": experiment.train.cpus_per_worker}
    evaluator = CheckpointEvaluator(
        experiment, trained.dataset, trained.diffusion, World(device=device), trained.numerics, **options
    )
    trained.model.to(device).requires_grad_(False)
    train, pictures = experiment.train, list[str]()
    records = evaluator.evaluate(
        trained.weights,
        trained.columns,
        run_folder=run_folder,
        evaluated_on="own workers",
        trajectories=train.tracker.trajectories if train.trackers else 0,
        on_picture=pictures.append,
    )
    run_id = experiment.run_id(trained.dataset.content_hash)
    values = summary(records)
    for tracker in make_trackers(TrackedRun(experiment, run_folder, run_id, images_seen, "evaluation")):
        tracker.log(images_seen, values)
        for uri in pictures:
            tracker.picture(images_seen, kind_of(uri), storage.read_bytes(uri))
        tracker.close()
    channel.put(EVALUATED, {"images_seen": images_seen, **values})
    return values


def _complete(run_folder: str, images_seen: int) -> str:
    """Wait until the checkpoint at `images_seen` is complete and return its folder."""
    checkpoint = ck.folder_of(run_folder, images_seen)
    end = time.monotonic() + CHECKPOINT_WAIT_SECONDS
    while not storage.exists(storage.join(checkpoint, ck.COMPLETE)):
        if time.monotonic() > end:
            raise TimeoutError(f"{checkpoint} was not complete within {CHECKPOINT_WAIT_SECONDS:.0f} s")
        time.sleep(0.2)
    return checkpoint
