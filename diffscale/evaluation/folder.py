"""Metrics of images on disk: a folder, an .npz of samples or an Arrow dataset, against a reference."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from diffscale.config.experiment import EvalSettings
from diffscale.core import storage
from diffscale.core.cache import cache_dir, file_lock
from diffscale.core.errors import UserError
from diffscale.core.hashing import identify
from diffscale.data import open_dataset
from diffscale.distributed.connect import connect
from diffscale.evaluation.distribute import devices
from diffscale.evaluation.evaluator import Evaluator, with_warning
from diffscale.evaluation.image_sources import FileSource, Images, is_dataset, open_images, select_images, unpacked
from diffscale.evaluation.metrics.registry import check_counts, parse_metric
from diffscale.evaluation.published import PUBLISHED, statistics_file

if TYPE_CHECKING:
    from diffscale.data import Dataset

SMALLEST, LARGEST = 4, 8192  # side in pixels: the least of eval.eval_resolution, the most of a build


def evaluate_folder(
    place: str,
    reference: str,
    metrics: Sequence[str],
    resize: str = "default",
    workers: int = 0,
    classes: bool = False,
    nearest: int = 0,
    resolution: int | None = None,
    on_picture: Callable[[str], None] = lambda uri: None,
) -> list[dict[str, Any]]:
    """Return every metric of the images at `place` against those at `reference`, by column name.

    Files are decoded, cropped and resized by the choices of a dataset on the other side (`open_images`), so the folder
    that it was built of has the distance 0. Sides of different resolution are compared at the larger one; smaller
    images are enlarged by LANCZOS. Features stay in the cache until the end, from where an interrupted call resumes.
    Raises UserError for sizes that do not decide the pixels, too few images for a metric, and missing weights.

    reference: a folder, an archive, an .npz of samples, an Arrow dataset, an .npz of statistics, or the name of
        published ones.
    workers: Ray actors; fewer than two: this process.
    classes: each metric for each class too, of two Arrow datasets with the same classes.
    nearest: number of images in the picture of those nearest to reference images.
    resolution: side in pixels to which files are cropped and resized, where no dataset decides it.
    on_picture: called with the path of that picture.
    """
    if not reference:
        expected = "a dataset, a folder of images, or an .npz of statistics to compare with"
        raise UserError(setting="reference", value=reference, expected=expected)
    if reference in PUBLISHED and not Path(reference).exists():
        reference = str(statistics_file(reference))
    reference = storage.resolve(reference, "--reference", written=False)
    statistics = Path(reference) if reference.endswith(".npz") and not _has_images(Path(reference)) else None
    if statistics and (classes or nearest):
        expected = "a dataset or images: an .npz of statistics has neither classes nor neighbours"
        raise UserError(setting="reference", value=reference, expected=expected)
    if resolution is not None and not SMALLEST <= resolution <= LARGEST:
        raise UserError(setting="--resolution", value=resolution, expected=f"{SMALLEST} to {LARGEST} pixels")
    with unpacked() as unpack:
        images, theirs = _open_both(place, None if statistics else reference, unpack, resolution)
        kinds = [parse_metric(name) for name in metrics]
        check_counts(kinds, images.n, None if statistics else theirs.n, ("FOLDER", "reference"))
        if classes:
            _check_classes(images, theirs)
        evaluator = _evaluator(images, theirs, metrics, resize, workers, classes, statistics)
        identity = identify(images=images.content_hash, evaluator=evaluator.identity())
        work = cache_dir() / "evaluations" / identity
        source = select_images(images, np.arange(images.n))
        alone = file_lock(cache_dir() / "locks" / identity, f"the same evaluation of {place}")
        with alone:
            evaluation = evaluator.evaluate_source(source, folder=work, lossy=bool(images.lossy))
            if nearest:
                picture = str(Path(f"{Path(place).stem}-nearest.png").resolve())
                storage.write_bytes(picture, evaluator.nearest_picture(source, work, nearest))
                on_picture(picture)
            shutil.rmtree(work, ignore_errors=True)
    rows = evaluation.measurements
    notes = [_resized(images, "evaluated"), "" if statistics else _resized(theirs, "reference")]
    for note in filter(None, notes):
        rows = [with_warning(row, note) for row in rows]
    return [row.fields() for row in rows]


def _evaluator(
    images: Images,
    theirs: Images,
    metrics: Sequence[str],
    resize: str,
    workers: int,
    classes: bool,
    statistics: Path | None,
) -> Evaluator:
    """Construct the evaluator of images on disk; the arguments are those of `evaluate_folder`."""
    side = max(images.resolution, theirs.resolution)
    if side < SMALLEST:
        raise UserError(setting="FOLDER", value=side, expected=f"images of at least {SMALLEST} pixels")
    actors, device = 0, "cpu"
    if workers > 1:
        connect()
        actors, device = devices(workers)
    settings = EvalSettings(
        metrics=tuple(metrics),
        n_generated=images.n,
        eval_resolution=side,
        resize=resize,
        grid_images=0,
    )
    return Evaluator(
        settings,
        cast("Dataset", theirs),  # only a model's samples and grids need more than its resolution
        str(cache_dir()),
        compared=theirs,
        device=device,
        actors=actors,
        per_class=classes,
        reference_file=statistics,
    )


def _open_both(place: str, reference: str | None, unpack: Path, resolution: int | None) -> tuple[Images, Images]:
    """Open the images and their reference; files take the choices of a dataset on the other side.

    reference: None for a file of statistics; then the images stand in its place.
    """
    if reference is None:
        images = open_images(place, unpack / "images", resolution=resolution)
        return images, images
    ours, theirs = (place, unpack / "images"), (reference, unpack / "reference")
    if is_dataset(reference):
        dataset = open_dataset(reference)
        _refuse_resolution(resolution, reference)
        return open_images(*ours, like=dataset), dataset
    if is_dataset(place):
        dataset = open_dataset(place)
        _refuse_resolution(resolution, place)
        return dataset, open_images(*theirs, like=dataset)
    return open_images(*ours, resolution=resolution), open_images(*theirs, resolution=resolution)


def _refuse_resolution(resolution: int | None, dataset: str) -> None:
    if resolution is not None:
        raise UserError(
            setting="--resolution",
            value=resolution,
            expected="nothing",
            reason=f"the choices of {dataset} decide how images are cropped and resized",
        )


def _resized(images: Images, name: str) -> str:
    if not isinstance(images, FileSource) or not images.resized:
        return ""
    return f"{images.resized:,} of {images.n:,} {name} images were cropped or resized to {images.resolution} pixels"


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
