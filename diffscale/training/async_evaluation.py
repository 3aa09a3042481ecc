"""Evaluates checkpoints in a separate Ray Train task, on its own device, while training continues.

Its records are those that the training workers would have written (CONTRIBUTING.md, decision 18). Ray Train's
controller imports this module, so it does without torch; the task itself is async_evaluation_task.py.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffscale.core.errors import UserError
from diffscale.core.provenance import job_environment
from diffscale.training.spec import TASK_GPU

if TYPE_CHECKING:
    from ray.train import Checkpoint, ValidationConfig

    from diffscale.config.experiment import Experiment


def wanted(experiment: Experiment, gpu: bool, deciding: bool) -> bool:
    """Return whether a separate task evaluates the run. `auto`: where the cluster has a device that no worker needs.

    Raises UserError where eval.workers=own is impossible.

    gpu: whether the workers train on GPUs.
    deciding: whether the run is a trial of a sweep, which waits for each record to decide whether the trial continues
        and whose other trials need the free devices.
    """
    settings, train = experiment.eval, experiment.train
    if not settings.n_generated or settings.workers == "training":
        return False
    if deciding:
        if settings.workers == "own":
            raise UserError(
                setting="eval.workers",
                value="own",
                expected="auto or training",
                reason="the sweep waits for each evaluation",
            )
        return False
    import ray  # import cost

    most, own = train.max_workers, settings.devices or 1
    have = ray.cluster_resources() if settings.workers == "own" else ray.available_resources()
    needs = {"CPU": train.cpus_per_worker, "GPU": 1} if gpu else {"CPU": train.cpus_per_worker}
    short = [name for name, count in needs.items() if have.get(name, 0) < count * (most + own)]
    if short and settings.workers == "own":
        raise UserError(
            setting="eval.workers",
            value="own",
            expected=f"{'a' if own == 1 else own} {short[0]}{'' if own == 1 else 's'} besides those of {most} "
            "training workers",
            fix="eval.workers=auto: the training workers evaluate where no device is free",
        )
    return not short


def validation_config(config: dict[str, Any]) -> ValidationConfig:
    """Return Ray Train's configuration of the task. config: that of the training workers."""
    from ray.train import ValidationConfig, ValidationTaskConfig  # import cost

    from diffscale.config.experiment import Experiment  # import cost

    experiment = Experiment.model_validate_json(config["experiment"])
    of_task = TASK_GPU if (experiment.eval.devices or 1) > 1 else 1
    ours = {name: config[name] for name in ("experiment", "run_folder", "launch", "gpu")}
    return ValidationConfig(
        fn=evaluate,
        task_config=ValidationTaskConfig(fn_kwargs={"config": ours}),
        ray_remote_kwargs={
            "num_cpus": experiment.train.cpus_per_worker,
            "num_gpus": of_task if config["gpu"] else 0,
            "runtime_env": {"env_vars": job_environment()},
        },
    )


def submit(images_seen: int, rank: int) -> None:
    """Have Ray Train evaluate a checkpoint; every rank calls it.

    Ray's own checkpoint only carries the number of images: the run's checkpoints are in its folder, and this one may
    still be written.
    """
    import ray.train  # import cost

    with tempfile.TemporaryDirectory(prefix="diffscale-mark-") as folder:
        Path(folder, "images_seen").write_text(str(images_seen))
        ray.train.report(
            {"images_seen": images_seen},
            checkpoint=ray.train.Checkpoint(folder) if rank == 0 else None,
            validation=ray.train.ValidationTaskConfig(fn_kwargs={"images_seen": images_seen}),
        )


def evaluate(checkpoint: Checkpoint, **arguments: Any) -> dict[str, float]:
    """Evaluate in Ray Train's validation task and return the values, after their records were written."""
    from diffscale.training.async_evaluation_task import evaluate_images  # import cost

    return evaluate_images(arguments["config"], arguments["images_seen"])
