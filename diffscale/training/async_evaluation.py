"""Evaluation beside training: a task of Ray Train's, with a device of its own, evaluates checkpoints of the run while
the workers go on. What it writes is what the training workers would have written (DECISIONS 18).

Without torch at import, since Ray Train's controller imports it too (process_group.py); the task is beside_task.py.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffscale.core.errors import UserError
from diffscale.core.provenance import job_environment

if TYPE_CHECKING:
    from ray.train import Checkpoint, ValidationConfig

    from diffscale.config.experiment import Experiment


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
            setting="eval.workers",
            value="own",
            expected=f"a {short[0]} besides those of {most} training workers",
            fix="eval.workers=auto: the training workers evaluate where nothing is free",
        )
    return not short


def validation_config(config: dict[str, Any]) -> ValidationConfig:
    """For the trainer. config: that of the training workers."""
    from ray.train import ValidationConfig, ValidationTaskConfig

    from diffscale.config.experiment import Experiment

    cpus = Experiment.model_validate_json(config["experiment"]).train.cpus_per_worker
    ours = {name: config[name] for name in ("experiment", "run_folder", "launch", "gpu")}
    return ValidationConfig(
        fn=evaluate,
        task_config=ValidationTaskConfig(fn_kwargs={"config": ours}),
        ray_remote_kwargs={
            "num_cpus": cpus,
            "num_gpus": int(config["gpu"]),
            "runtime_env": {"env_vars": job_environment()},
        },
    )


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
    from diffscale.training.async_evaluation_task import evaluate_images

    return evaluate_images(asked["config"], asked["images_seen"])
