"""Metrics of images on disk: a folder, an .npz of samples or an Arrow dataset, against a reference."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from diffscale.config.experiment import EvalSettings
from diffscale.core import storage
from diffscale.core.cache import cache_dir
from diffscale.core.errors import UserError
from diffscale.core.hashing import identify
from diffscale.distributed.connect import connect
from diffscale.evaluation.distribute import devices
from diffscale.evaluation.evaluator import Evaluator
from diffscale.evaluation.image_sources import Images, open_images, select_images

if TYPE_CHECKING:
    from diffscale.data import Dataset


def evaluate_folder(
    place: str,
    reference: str,
    metrics: Sequence[str],
    resize: str = "default",
    workers: int = 0,
    classes: bool = False,
    nearest: int = 0,
    on_picture: Callable[[str], None] = lambda uri: None,
) -> list[dict[str, Any]]:
    """Return every metric of the images at `place` against those at `reference`, by column name.

    Both are compared at the larger of their resolutions; smaller images are enlarged by LANCZOS. Features stay in the
    cache until the end, from where an interrupted call resumes. Raises UserError for missing weights, before any image
    is read.

    reference: a folder, an .npz of samples, an Arrow dataset, or an .npz of statistics.
    workers: Ray actors; fewer than two: this process.
    classes: each metric for each class too, of two Arrow datasets with the same classes.
    nearest: number of images in the picture of those nearest to reference images.
    on_picture: called with the path of that picture.
    """
    if not reference:
        expected = "a dataset, a folder of images, or an .npz of statistics to compare with"
        raise UserError(setting="reference", value=reference, expected=expected)
    reference = storage.resolve(reference, "--reference", written=False)
    images = open_images(place)
    statistics = Path(reference) if reference.endswith(".npz") and not _has_images(Path(reference)) else None
    theirs = images if statistics else open_images(reference)
    if statistics and (classes or nearest):
        expected = "a dataset or images: an .npz of statistics has neither classes nor neighbours"
        raise UserError(setting="reference", value=reference, expected=expected)
    if classes:
        _check_classes(images, theirs)
    actors, device = 0, "cpu"
    if workers > 1:
        connect()
        actors, device = devices(workers)
    side = max(images.resolution, theirs.resolution)
    settings = EvalSettings(
        metrics=tuple(metrics),
        n_generated=images.n,
        eval_resolution=side,
        resize=resize,
        grid_images=0,
    )
    evaluator = Evaluator(
        settings,
        cast("Dataset", theirs),  # only a model's samples and grids need more than its resolution
        str(cache_dir()),
        compared=theirs,
        device=device,
        actors=actors,
        per_class=classes,
        reference_file=statistics,
    )
    views = [str(view) for view in evaluator.views.values()]
    work = cache_dir() / "evaluations" / identify(images=images.content_hash, views=views)
    source = select_images(images, np.arange(images.n))
    evaluation = evaluator.evaluate_source(source, folder=work, lossy=bool(images.lossy))
    if nearest:
        picture = str(Path(f"{Path(place).stem}-nearest.png").resolve())
        storage.write_bytes(picture, evaluator.nearest_picture(source, work, nearest))
        on_picture(picture)
    shutil.rmtree(work)
    return [m.fields() for m in evaluation.measurements]


def refuse_sampling(**given: object) -> None:
    """Raise UserError for options of sampling, which images on disk do not need. given: by option, falsy if absent."""
    for setting, value in given.items():
        if value:
            raise UserError(
                setting=setting,
                value=value,
                expected="a run or a checkpoint of one",
                reason="images on disk are not sampled",
            )


def _check_classes(images: Images, theirs: Images) -> None:
    names = [getattr(i, "class_names", []) for i in (images, theirs)]
    if not names[0] or names[0] != names[1]:
        expected = f"two Arrow datasets with the same classes (these have {len(names[0])} and {len(names[1])})"
        raise UserError(setting="per-class", value=True, expected=expected)


def _has_images(file: Path) -> bool:
    try:
        with np.load(file, allow_pickle=False) as content:
            return "arr_0" in content and "mu" not in content
    except (OSError, ValueError):
        return False
