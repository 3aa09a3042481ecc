"""Evaluation beside training: a task of Ray Train's, with a device of its own, evaluates checkpoints of the run while
the workers go on. What it writes is what the training workers would have written (DECISIONS 18)."""

from __future__ import annotations

import json
import logging
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from diffscale import storage
from diffscale.errors import UserError
from diffscale.experiment import Experiment
from diffscale.provenance import job_environment
from diffscale.training import checkpoint as ck
from diffscale.training.channel import Channel, Notices
from diffscale.training.history import make_trackers
from diffscale.training.judging import Judge, judged
from diffscale.training.monitor import EVALUATED, summary
from diffscale.training.numerics import Numerics
from diffscale.training.parallel import World
from diffscale.training.setting_up import use_threads

if TYPE_CHECKING:
    from ray.train import Checkpoint, ValidationConfig

CHECKPOINT_WAIT_SECONDS = 600.0


def wanted(experiment: Experiment, gpu: bool, deciding: bool) -> bool:
    """Whether a run is evaluated beside its training. `auto`: where the cluster has a device that no worker needs.

    deciding: whether it is a trial of a sweep, which waits for each record to decide if it goes on, and whose other
    trials need what is free.
    Raises UserError where eval.workers=own cannot be.
    """
    settings, train = experiment.eval, experiment.train
    if not settings.n_generated or settings.workers == "training":
        return False
    if deciding:
        if settings.workers == "own":
            raise UserError(
                setting="eval.workers", value="own", expected="auto or training: the sweep waits for each evaluation"
            )
        return False
    import ray

    most = train.workers if isinstance(train.workers, int) else train.workers[1]
    have = ray.cluster_resources() if settings.workers == "own" else ray.available_resources()
    needs = {"CPU": train.cpus_per_worker, "GPU": 1} if gpu else {"CPU": train.cpus_per_worker}
    short = [name for name, count in needs.items() if have.get(name, 0) < count * (most + 1)]
    if short and settings.workers == "own":
        raise UserError(
            setting="eval.workers", value="own", expected=f"a {short[0]} besides those of {most} training workers",
            fix="eval.workers=auto: the training workers evaluate where nothing is free",
        )  # fmt: skip
    return not short


def validation_config(config: dict[str, Any]) -> ValidationConfig:
    """For the trainer. config: that of the training workers."""
    from ray.train import ValidationConfig, ValidationTaskConfig

    cpus = Experiment.model_validate_json(config["experiment"]).train.cpus_per_worker
    ours = {name: config[name] for name in ("experiment", "run_folder", "launch", "gpu")}
    return ValidationConfig(
        fn=evaluate,
        task_config=ValidationTaskConfig(fn_kwargs={"config": ours}),
        ray_remote_kwargs={
            "num_cpus": cpus, "num_gpus": int(config["gpu"]), "runtime_env": {"env_vars": job_environment()},
        },
    )  # fmt: skip


def hand_over(images_seen: int, rank: int) -> None:
    """Asks Ray Train to evaluate a checkpoint; every rank calls it. Ray's own checkpoint is only a mark: the run's are
    in its folder, and this one may still be on its way there."""
    import ray.train

    with tempfile.TemporaryDirectory(prefix="diffscale-mark-") as folder:
        Path(folder, "images_seen").write_text(str(images_seen))
        ray.train.report(
            {"images_seen": images_seen},
            checkpoint=ray.train.Checkpoint(folder) if rank == 0 else None,
            validation=ray.train.ValidationTaskConfig(fn_kwargs={"images_seen": images_seen}),
        )


def evaluate(checkpoint: Checkpoint, **asked: Any) -> dict[str, float]:
    """In Ray Train's validation task: the evaluation's values, after its records were written."""
    config, images_seen = asked["config"], asked["images_seen"]
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
    from diffscale.trained import load_trained

    experiment, run_folder = Experiment.model_validate_json(config["experiment"]), config["run_folder"]
    if images_seen in judged(run_folder, experiment):  # a restart came past here before
        return {}
    device = torch.device("cuda" if config["gpu"] else "cpu")
    use_threads(experiment.train.cpus_per_worker, device)
    trained = load_trained(_complete(run_folder, images_seen), experiment.eval.ema, experiment)
    stored = json.loads(storage.read_bytes(storage.join(run_folder, "numerics.json")))
    judge = Judge(
        experiment, trained.dataset, trained.diffusion, World(device=device), Numerics(**stored["numerics"])
    )  # fmt: skip
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
