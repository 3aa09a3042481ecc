"""Metrics of images that are just there: a folder, an .npz of samples or an Arrow dataset, against a reference."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from diffscale.core import storage
from diffscale.core.errors import UserError
from diffscale.data import open_dataset
from diffscale.evaluation import feature_store as spool
from diffscale.evaluation import pictures
from diffscale.evaluation.distribute import Columns, Featuriser, View, chunk_ranges, in_process, on_ray
from diffscale.evaluation.feature_store import Spool
from diffscale.evaluation.image_sources import FileSource, Source, source_of
from diffscale.evaluation.metrics.registry import (
    Measurement,
    Metric,
    measure,
    memorised,
    nearest_samples,
    parse_metric,
    per_class,
    views_of,
)
from diffscale.evaluation.networks.resize import upsample
from diffscale.evaluation.networks.weights import cache_folder
from diffscale.evaluation.reference import (
    Reference,
    ReferenceImages,
    get_reference,
    reference_from_npz,
    reference_rows,
)
from diffscale.records.store import identify


def open_images(place: str) -> ReferenceImages:
    """An Arrow dataset of diffscale, a folder of images or an .npz with arr_0. Raises UserError for anything else."""
    if storage.is_remote(place) or (Path(place) / "manifest.json").exists():
        return open_dataset(place)
    return FileSource.open(Path(place))


@dataclass(frozen=True)
class FolderEvaluation:
    """nearest_png: the images nearest to reference images, each beside it; None unless it was asked for."""

    measurements: list[Measurement]
    nearest_png: bytes | None = None


def evaluate_folder(
    place: str,
    reference: str,
    metrics: Sequence[str],
    *,
    resolution: int | None = None,
    resize: str = "default",
    n_reference: int | None = None,
    actors: int = 0,
    device: str = "cpu",
    classes: bool = False,
    memorised: int = 0,
) -> FolderEvaluation:
    """Every metric of the images at `place` against those at `reference` (or its .npz of statistics).

    Both are looked at at `resolution` (default: the larger of the two; smaller images are enlarged by LANCZOS).
    classes: each metric for each class too, of two Arrow datasets with the same classes. memorised: how many images
    the picture of nearest neighbours shows. Features stay in the cache until the end, so that a call that was cut off
    goes on. Raises UserError for missing weights, before any image is read.
    """
    parsed = [parse_metric(name) for name in metrics]
    images = open_images(place)
    statistics = Path(reference) if reference.endswith(".npz") and not _has_images(Path(reference)) else None
    theirs = None if statistics else open_images(reference)
    if theirs is None and (classes or memorised):
        expected = "a dataset or images: an .npz of statistics has neither classes nor neighbours"
        raise UserError(setting="reference", value=reference, expected=expected)
    if classes:
        _check_classes(images, theirs)
    side = _common_resolution(resolution, images, theirs)
    views = views_of(parsed, side, resize)
    featurise = Featuriser(list(views.values()), device)

    def compute(source: Source, view: View, todo: Sequence[tuple[int, int]]) -> Iterator[tuple[int, Columns]]:
        return run(source, featurise.only(view), todo)

    def run(source: Source, with_: Featuriser, todo: Sequence[tuple[int, int]]) -> Iterator[tuple[int, Columns]]:
        if actors:
            workers = min(actors, max(len(todo), 1))
            return on_ray(source, with_.views, todo, workers=workers, gpu=device == "cuda")
        return in_process(source, with_, todo)

    references: dict[str, Reference] = {}
    for network, view in views.items():
        if statistics is not None:
            references[network] = reference_from_npz(statistics, view)
        elif theirs is not None:
            plain = replace(view, outputs=tuple(o for o in view.outputs if o != "logits"))
            references[network] = get_reference(
                theirs, plain, n_reference=n_reference, place=cache_folder() / "references", compute=compute
            )
    source = source_of(images, np.arange(images.n))
    work = cache_folder() / "evaluations" / identify(images=images.content_hash, views=[str(v) for v in views.values()])
    for first, columns in run(source, featurise, chunk_ranges(source.n, source.batch, spool.ends(work))):
        spool.write_chunk(work, first, columns)
    generated = Spool(work, source.n)
    measurements = _measure(parsed, views, generated, references, bool(images.lossy), classes)
    picture = None
    if memorised and theirs is not None:
        view = next(iter(views.values()))
        found = nearest_samples(view, generated, references[view.network], None, memorised)
        rows = reference_rows(theirs.n, n_reference)[found.rows]
        picture = _side_by_side(source_of(images, found.samples), source_of(theirs, rows), side, found.captions)
    shutil.rmtree(work)
    return FolderEvaluation(measurements, picture)


def _common_resolution(resolution: int | None, images: ReferenceImages, theirs: ReferenceImages | None) -> int:
    largest = max(images.resolution, theirs.resolution if theirs is not None else 0)
    if resolution is not None and resolution < largest:
        expected = f"at least {largest}, the side of the images"
        raise UserError(setting="resolution", value=resolution, expected=expected)
    return resolution or largest


def _check_classes(images: ReferenceImages, theirs: ReferenceImages | None) -> None:
    names = [getattr(i, "class_names", []) for i in (images, theirs)]
    if not names[0] or names[0] != names[1]:
        expected = f"two Arrow datasets with the same classes (these have {len(names[0])} and {len(names[1])})"
        raise UserError(setting="per-class", value=True, expected=expected)


def _side_by_side(left: Source, right: Source, side: int, captions: Sequence[str]) -> bytes:
    pixels = [upsample(source.images(0, source.n)[0], side) for source in (left, right)]
    return pictures.to_png(pictures.pairs(pixels[0], pixels[1], captions))


def _measure(
    parsed: Sequence[Metric],
    views: dict[str, View],
    generated: Spool,
    references: dict[str, Reference],
    lossy: bool,
    classes: bool,
) -> list[Measurement]:
    out: list[Measurement] = []
    copied = {net: memorised(view, generated, references[net], None) for net, view in views.items()}
    for metric in parsed:
        view, reference = views[metric.network], references[metric.network]
        rows = measure(metric, view, generated, reference)
        rows += per_class(metric, view, generated, reference) if classes else []
        for row in rows:
            warning = row.warning
            if lossy != reference.lossy and reference.has_features:
                lossy_warning = "only one of samples and reference was stored lossily (JPEG)"
                warning = f"{warning}; {lossy_warning}" if warning else lossy_warning
            out.append(replace(row, memorisation=copied[metric.network], warning=warning))
    return out


def _has_images(file: Path) -> bool:
    try:
        with np.load(file, allow_pickle=False) as content:
            return "arr_0" in content and "mu" not in content
    except (OSError, ValueError):
        return False
