"""Metrics of images that are just there: a folder, an .npz of samples or an Arrow dataset, against a reference."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from diffscale import storage
from diffscale.data import open_dataset
from diffscale.errors import UserError
from diffscale.evaluation import spool
from diffscale.evaluation.generate import Columns, Featuriser, View, chunk_ranges, in_process, on_ray
from diffscale.evaluation.metrics import Measurement, measure, memorised, parse_metric, views_of
from diffscale.evaluation.reference import Reference, ReferenceImages, get_reference, reference_from_npz
from diffscale.evaluation.sources import DatasetSource, FileSource, Source
from diffscale.evaluation.spool import Spool
from diffscale.evaluation.weights import cache_folder


def open_images(place: str) -> ReferenceImages:
    """An Arrow dataset of diffscale, a folder of images or an .npz with arr_0. Raises UserError for anything else."""
    if storage.is_remote(place) or (Path(place) / "manifest.json").exists():
        return open_dataset(place)
    return FileSource.open(Path(place))


def evaluate_folder(
    place: str, reference: str, metrics: Sequence[str], *, resolution: int | None = None, resize: str = "default",
    n_reference: int | None = None, actors: int = 0, device: str = "cpu",
) -> list[Measurement]:  # fmt: skip
    """Every metric of the images at `place` against those at `reference` (or its .npz of statistics).

    Both are looked at at `resolution` (default: the larger of the two; smaller images are enlarged by LANCZOS).
    Raises UserError for missing weights, before any image is read.
    """
    parsed = [parse_metric(name) for name in metrics]
    images = open_images(place)
    statistics = Path(reference) if reference.endswith(".npz") and not _has_images(Path(reference)) else None
    theirs = None if statistics else open_images(reference)
    sides = [images.resolution] + ([theirs.resolution] if theirs is not None else [])
    side = resolution or max(sides)
    if max(sides) > side:
        expected = f"at least {max(sides)}, the side of the images"
        raise UserError(setting="resolution", value=side, expected=expected)
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
    source = images if isinstance(images, FileSource) else DatasetSource(images, np.arange(images.n))
    with tempfile.TemporaryDirectory(prefix="diffscale-evaluation-") as temporary:
        for first, columns in run(source, featurise, chunk_ranges(source.n, source.batch)):
            spool.write_chunk(Path(temporary), first, columns)
        generated = Spool(Path(temporary))
        return _measure(parsed, views, generated, references, bool(images.lossy))


def _measure(parsed, views, generated: Spool, references: dict[str, Reference], lossy: bool) -> list[Measurement]:
    out: list[Measurement] = []
    for metric in parsed:
        view, reference = views[metric.network], references[metric.network]
        copied = memorised(view, generated, reference, None)
        for row in measure(metric, view, generated, reference):
            warning = row.warning
            if lossy != reference.lossy and reference.has_features:
                lossy_warning = "only one of samples and reference was stored lossily (JPEG)"
                warning = f"{warning}; {lossy_warning}" if warning else lossy_warning
            out.append(replace(row, memorisation=copied, warning=warning))
    return out


def _has_images(file: Path) -> bool:
    try:
        with np.load(file, allow_pickle=False) as content:
            return "arr_0" in content and "mu" not in content
    except (OSError, ValueError):
        return False
