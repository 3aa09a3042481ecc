"""The evaluation of one checkpoint beside training, in a process of its own."""

from __future__ import annotations

import json
import logging
import time
from typing import Any

import torch

from diffscale.config.experiment import Experiment
from diffscale.core import storage
from diffscale.distributed.messages import Channel, Notices
from diffscale.training.checkpoint import layout as ck
from diffscale.training.checkpoint_evaluation import Judge, judged
from diffscale.training.history import make_trackers
from diffscale.training.load import load_trained
from diffscale.training.monitor import EVALUATED, summary
from diffscale.training.numerics import Numerics
from diffscale.training.parallel import World
from diffscale.training.setting_up import settle_process

CHECKPOINT_WAIT_SECONDS = 600.0


def evaluate_images(config: dict[str, Any], images_seen: int) -> dict[str, float]:
    """Evaluates the checkpoint at `images_seen` of the run of these training workers, and tells the command."""
    channel = Channel(config["launch"])
    logger, notices = logging.getLogger("diffscale"), Notices(channel, "evaluation")
    logger.addHandler(notices)
    try:
        return _evaluate(channel, config, images_seen)
    except Exception as error:
        logger.warning("the evaluation at %d images failed: %s", images_seen, error)
        raise
    finally:
        logger.removeHandler(notices)


def _evaluate(channel: Channel, config: dict[str, Any], images_seen: int) -> dict[str, float]:
    experiment, run_folder = Experiment.model_validate_json(config["experiment"]), config["run_folder"]
    if images_seen in judged(run_folder, experiment):  # a restart came past here before
        return {}
    device = torch.device("cuda" if config["gpu"] else "cpu")
    settle_process(experiment.train.cpus_per_worker, device)
    trained = load_trained(_complete(run_folder, images_seen), experiment.eval.ema, experiment)
    stored = json.loads(storage.read_bytes(storage.join(run_folder, "numerics.json")))
    judge = Judge(experiment, trained.dataset, trained.diffusion, World(device=device), Numerics(**stored["numerics"]))
    model = trained.model.to(device).requires_grad_(False)
    values = summary(judge.judge(model, run_folder, trained.columns, "own workers"))
    run_id = experiment.run_id(trained.dataset.content_hash)
    for tracker in make_trackers(
        experiment.train.trackers, run_folder, experiment.name, run_id, experiment.dotted(), images_seen, "evaluation"
    ):
        tracker.log(images_seen, values)
        tracker.close()
    channel.put(EVALUATED, {"images_seen": images_seen, **values})
    return values


def _complete(run_folder: str, images_seen: int) -> str:
    """The checkpoint at `images_seen`, once it is complete."""
    checkpoint = ck.folder_of(run_folder, images_seen)
    end = time.monotonic() + CHECKPOINT_WAIT_SECONDS
    while not storage.exists(storage.join(checkpoint, ck.COMPLETE)):
        if time.monotonic() > end:
            raise TimeoutError(f"{checkpoint} was not complete within {CHECKPOINT_WAIT_SECONDS:.0f} s")
        time.sleep(0.2)
    return checkpoint
