"""Evaluates finished or running runs again: other checkpoints, averages, samplers and metrics, over Ray."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from diffscale.core import storage
from diffscale.core.cache import cache_dir
from diffscale.core.errors import UserError
from diffscale.core.hashing import identify
from diffscale.core.places import require_writable
from diffscale.core.progress import working
from diffscale.data import Dataset
from diffscale.distributed.connect import connect
from diffscale.evaluation import Sampling
from diffscale.evaluation.distribute import devices
from diffscale.evaluation.folder import evaluate_folder, refuse_sampling
from diffscale.evaluation.sample_writer import SampleWriter
from diffscale.records.schema import Record
from diffscale.training.checkpoint import layout as ck
from diffscale.training.checkpoint_evaluation import CheckpointEvaluator
from diffscale.training.load import TrainedModel, is_run, list_targets, load_trained, samples_source, settings_of_run
from diffscale.training.parallel import World
from diffscale.training.run_readme import FILE, write_readme
from diffscale.training.settings_check import refuse_unfit_sampler


@dataclass(frozen=True)
class EvaluateOptions:
    """What to evaluate of a run, and how, beyond the `eval` settings."""

    checkpoint: str = "last"  # last, all, or a number of images seen
    averages: tuple[str, ...] = ()  # of the weights; empty: that of the settings
    solvers: tuple[str, ...] = ()  # "heun,steps=18"; empty: that of the settings
    guidances: tuple[str, ...] = ()  # "1.5,interval=-3:5"; empty: that of the settings
    labels: str = "train"  # train, uniform, balanced, none, or a class
    precision: str = ""  # fp32 or bf16 for sampling; empty: as the run computes
    reference: str = ""  # statistics in place of the training images: an .npz, or a published name
    per_class: bool = False  # each metric for each class too
    memorised: int = 0  # samples in the picture of those nearest to training images
    resolution: int = 0  # side in pixels to which images of a folder are resized; 0: what the reference decides
    keep: str = ""  # folder in which to keep the images
    keep_format: str = "png"  # or arrow, npz
    workers: int = 0  # Ray actors; 0: one for each GPU, or else CPU, of the cluster


def evaluate_target(
    target: str,
    overrides: Sequence[str],
    metrics: str,
    n: int,
    resize: str,
    options: EvaluateOptions,
    on_picture: Callable[[str], None] = lambda uri: None,
) -> list[dict[str, Any]]:
    """Evaluate a run, a checkpoint or images on disk, and return the rows by column name.

    metrics, n, resize: short for overrides of a run; "", 0 and "default" change nothing

    Raises UserError for an option that would have no effect on such a target. See evaluate_run and evaluate_folder.
    """
    if is_run(target):
        if options.resolution:
            reason = "a run's samples are compared at eval.eval_resolution"
            raise UserError(setting="--resolution", value=options.resolution, expected="images on disk", reason=reason)
        records = evaluate_run(target, [*overrides, *short_settings(metrics, n, resize)], options, on_picture)
        return [json.loads(record.model_dump_json()) for record in records]
    refuse_sampling(
        OVERRIDE=list(overrides),
        n=n,
        ema=list(options.averages),
        solver=list(options.solvers),
        guidance=list(options.guidances),
        keep=options.keep,
        precision=options.precision,
        checkpoint=options.checkpoint.removeprefix("last"),
        labels=options.labels.removeprefix("train"),
    )
    return evaluate_folder(
        target,
        options.reference,
        (metrics or "fid").split(","),
        resize,
        options.workers,
        options.per_class,
        options.memorised,
        options.resolution or None,
        on_picture,
    )


def evaluate_run(
    target: str,
    overrides: Iterable[str] = (),
    options: EvaluateOptions = EvaluateOptions(),
    on_picture: Callable[[str], None] = lambda uri: None,
) -> list[Record]:
    """Evaluate every checkpoint × average × solver × guidance requested and write the records into the run's folder.

    Weights of the feature networks are loaded before the first sample is drawn: UserError when there are none.

    target: a run's folder or a checkpoint.
    overrides: other `eval` settings, as on the command line.
    on_picture: called with the URI of each picture.
    """
    overrides = list(overrides) + ([f"eval.reference={options.reference}"] if options.reference else [])
    records: list[Record] = []
    require_writable(target, "RUN")
    todo = [
        (uri, solver, average, guidance)
        for uri in list_targets(target, options.checkpoint)
        for solver in options.solvers or [None]
        for average in options.averages or [""]
        for guidance in options.guidances or [""]
    ]
    with working("evaluating", len(todo), "sets of weights and samplers") as work:
        for uri, solver, average, guidance in todo:
            experiment = settings_of_run(uri, [*overrides, *guidance_settings(guidance)], solver)
            trained = load_trained(uri, average or experiment.eval.ema, experiment)
            work.note = " ".join(filter(None, [trained.label, solver, guidance and f"guidance {guidance}"]))
            records += evaluate_trained(trained, options, on_picture)
            work.advance()
    run_folder = ck.run_of(target) or target
    if storage.exists(storage.join(run_folder, FILE)):  # the run has finished: its best value may be another one now
        write_readme(run_folder, ck.read_experiment(list_targets(run_folder)[-1]))
    return records


def guidance_settings(text: str) -> list[str]:
    """Return overrides for `1.5`, `1.5,interval=-3:5` or `2,KEY=VALUE` of any `eval.guidance_KEY`; none for "".

    Raises UserError for a scale that is no number.
    """
    if not text:
        return []
    scale, *rest = text.split(",")
    try:
        float(scale)
    except ValueError:
        raise UserError(
            setting="--guidance", value=text, expected="a scale, or a scale and 1.5,interval=-3:5"
        ) from None
    found = [f"eval.guidance_scale={scale}"]
    for part in rest:
        key, _, value = part.partition("=")
        name = key if key.startswith("guid") else f"guidance_{key}"
        found.append(f"eval.{name}={'[' + value.replace(':', ',') + ']' if key == 'interval' else value}")
    return found


def short_settings(metrics: str, n: int, resize: str) -> list[str]:
    """Return overrides for the command's short options; an empty one, 0 or "default" changes nothing."""
    given = {"metrics": metrics and f"[{metrics}]", "n_generated": n, "resize": resize.removeprefix("default")}
    return [f"eval.{name}={value}" for name, value in given.items() if value]


def evaluate_trained(
    trained: TrainedModel,
    options: EvaluateOptions = EvaluateOptions(),
    on_picture: Callable[[str], None] = lambda uri: None,
) -> list[Record]:
    """Evaluate one trained model over Ray actors and write its records; see evaluate_run."""
    refuse_unfit_sampler(trained.experiment, trained.dataset, trained.diffusion)
    connect()
    actors, device = devices(options.workers or trained.experiment.eval.devices or 0)
    here = device if torch.cuda.is_available() else "cpu"  # this process may be a driver without the actors' GPUs
    evaluator = CheckpointEvaluator(
        trained.experiment,
        trained.dataset,
        trained.diffusion,
        World(device=torch.device(here)),
        trained.numerics,
        device=device,
        actors=actors,
        per_class=options.per_class,
    )
    sampling = evaluator.sampling(options.precision, options.labels)
    writer = _writer(trained, evaluator.evaluator.dataset, sampling, options) if options.keep else None
    evaluator.evaluator.keep_images = writer
    records = evaluator.evaluate(
        trained.weights,
        trained.columns,
        run_folder=trained.run_folder,
        evaluated_on="own workers",
        sampling=sampling,
        work=cache_dir() / "evaluations",
        locks=cache_dir() / "locks",
        grid_suffix=True,
        nearest=options.memorised,
        on_picture=on_picture,
    )
    if writer is not None:
        writer.close()
    return records


def _writer(trained: TrainedModel, d: Dataset, sampling: Sampling, options: EvaluateOptions) -> SampleWriter:
    source = samples_source(trained, sampling)
    name = f"{trained.images_seen:09d}-{trained.ema}-{sampling.solver_name}-{identify(**source)[:8]}"
    folder = Path(options.keep).resolve() / name
    return SampleWriter(folder, options.keep_format, (d.channels, d.resolution, d.resolution), d.class_names, source)
