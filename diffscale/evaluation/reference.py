"""Reference statistics: computed once for a dataset × network × resize, by the first of the runs that need them.

A reference's folder holds `features.npz` (mean and covariance, the names of ADM's files), `spatial.npz` for sFID and
at most 50,000 of the features, for KID, classes and metrics of nearest neighbours.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import numpy as np
from numpy.typing import NDArray

from diffscale.core import storage
from diffscale.core.cache import cache_dir, file_lock
from diffscale.core.errors import UserError
from diffscale.core.hashing import identify
from diffscale.core.progress import working
from diffscale.data.loading.order import permutation
from diffscale.evaluation.distribute import LABELS, Columns, Gather, View, chunk_ranges
from diffscale.evaluation.feature_store import FeatureStore, chunks, ends, write_chunk
from diffscale.evaluation.image_sources import Images, ImageSource, select_images
from diffscale.evaluation.metrics.distances import Root
from diffscale.evaluation.metrics.precision_recall import usual_distance
from diffscale.evaluation.metrics.statistics import Moments, load_moments, moments_of, save_moments
from diffscale.evaluation.published import published_of

Compute = Callable[[ImageSource, View, Sequence[tuple[int, int]]], Iterator[tuple[int, Columns]]]
COMPLETE = "COMPLETE"
KEPT_FEATURES = 50_000
REFERENCE_SEED = 2020
MOST_PERMUTED = 1 << 24  # rows permuted as an array; the references of smaller datasets stay what they were


class KeyedRows:
    """The first `count` rows of a keyed permutation of n, computed where they are read, as an int64 array is."""

    def __init__(self, n: int, count: int) -> None:
        self._order, self._count = permutation(n, REFERENCE_SEED), min(count, n)

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, key: slice | NDArray) -> NDArray:
        if isinstance(key, slice):
            key = np.arange(*key.indices(self._count))
        return self._order.forward(np.asarray(key, np.int64))


@dataclass
class Reference:
    """Statistics of one view of a reference set."""

    key: str  # hash of the images, their resolution, network and resize
    n: int
    lossy: bool  # a source of the images was stored lossily
    view: View
    folder: Path | None = None
    file: Path | None = None
    _roots: dict[str, Root] = field(default_factory=dict)
    _usual: dict[str, float] = field(default_factory=dict)

    def moments(self, output: str = "features") -> Moments:
        if self.file is not None:
            return load_moments(self.file, spatial=output == "spatial")
        assert self.folder is not None
        return load_moments(self.folder / f"{output}.npz")

    def root(self, output: str = "features") -> Root:
        """Return the square root of the covariance, computed once (about a second at 2048 dimensions).

        Raises UserError for a file whose covariance is none.
        """
        if output not in self._roots:
            moments = self.moments(output)
            try:
                self._roots[output] = Root.of(moments)
            except ValueError as error:
                place = str(self.file or self.folder)
                raise UserError(
                    setting="reference", value=place, expected="the covariance of features", reason=str(error)
                ) from None
        return self._roots[output]

    @property
    def has_features(self) -> bool:
        return self.folder is not None

    def features(self, output: str = "features") -> NDArray:
        """Return the features (n,d) float32 on disk. Raises UserError for an .npz of statistics."""
        return self._store()[self.view.column(output)]

    def labels(self) -> NDArray:
        return self._store()[LABELS][:]

    def _store(self) -> FeatureStore:
        if self.folder is None:
            raise no_features(self.file)
        return FeatureStore(self.folder)

    def usual(self, heldout: Reference | None) -> float:
        """Return the distance below which 1 % of unseen images lie (`usual_distance`); cached."""
        name = heldout.key if heldout else ""
        if name not in self._usual:
            others = heldout.features() if heldout is not None else None
            self._usual[name] = usual_distance(self.features(), others)
        return self._usual[name]


def no_features(file: Path | None) -> UserError:
    """Return the refusal of what needs features of a file that has their statistics alone."""
    return UserError(
        setting="reference",
        value=str(file),
        expected="a dataset with features; an .npz of statistics has none",
        fix="leave out KID, precision, recall, density, coverage, memorisation and classes",
    )


def reference_rows(n: int, n_reference: int | None) -> NDArray:
    """Return rows of the reference images in a fixed random order, so that any first part is a fair sample.

    Above MOST_PERMUTED rows the order is a keyed permutation, evaluated where it is read, without an array of n rows.
    """
    if n > MOST_PERMUTED:
        return cast(NDArray, KeyedRows(n, n_reference or n))
    rows = np.random.RandomState(REFERENCE_SEED).permutation(n)
    return rows[: n_reference or n]


def references_folder(run_storage: str) -> Path:
    """Return the folder next to the runs if that is local (all trials share it), else in this machine's cache."""
    if storage.is_remote(run_storage):
        return cache_dir() / "references"
    return Path(storage.check_absolute(run_storage)) / "references"


def reference_key(images: Images, view: View, n_reference: int | None) -> str:
    n = min(n_reference or images.n, images.n)
    return identify(
        content=images.content_hash, n=n, network=view.recorded_network, resize=view.resize, resolution=view.resolution
    )


def get_reference(
    images: Images,
    view: View,
    *,
    n_reference: int | None,
    place: Path,
    compute: Compute,
    rank: int = 0,
    gather: Gather | None = None,
) -> Reference:
    """Return the reference from its folder under `place`, computed first if it is not complete.

    Many processes may call it at the same time: one computes, holding a lock that the kernel releases if it dies, and
    resumes from the chunks that another left. With `gather`, every rank calls it and shares the work; only rank 0
    needs the lock and the folder. Raises UserError for fewer than two images.

    compute: (source, view, chunk ranges) → chunks (see distribute.py).
    """
    if images.n < 2:
        raise UserError(setting="reference", value=images.n, expected="at least two reference images")
    key = reference_key(images, view, n_reference)
    rows = reference_rows(images.n, n_reference)
    # A folder holds the outputs that were requested together: sFID adds a column and so another folder.
    folder = place / ("-".join([key, *sorted(set(view.outputs) - {"features"})]))
    reference = Reference(key, len(rows), bool(images.lossy), view, folder)
    with file_lock(folder.with_suffix(".lock")) if rank == 0 else nullcontext():
        complete = rank == 0 and (folder / COMPLETE).exists()
        have = ends(folder) if rank == 0 else {}
        if gather is not None:
            complete, have = gather((complete, have))[0]
        if not complete:
            source = select_images(images, rows)
            todo = chunk_ranges(source.n, source.batch, have)
            done = source.n - sum(end - first for first, end in todo)
            with working(f"reference of {view.network}", source.n, done=done) as work:
                for first, columns in compute(source, view, todo):
                    write_chunk(folder, first, columns)
                    work.advance(len(columns[LABELS]))
            if rank == 0:
                _finish(folder, view)
    return reference


def _finish(folder: Path, view: View) -> None:
    everything = FeatureStore(folder)
    for output in view.outputs:
        save_moments(folder / f"{output}.npz", moments_of(everything[view.column(output)]))
    for first, (_, path) in chunks(folder).items():
        if first >= KEPT_FEATURES:
            path.unlink()
    storage.write_bytes(str(folder / COMPLETE), b"")


def reference_from_npz(file: Path, view: View) -> Reference:
    """Return published statistics (ADM's or EDM's .npz); the key is the file's SHA-256.

    A file of known name that does not say how many images it is of gets the number that its publishers state.
    """
    known = published_of(file)
    n = load_moments(file).n or (known.n if known else 0)
    return Reference(hashlib.sha256(file.read_bytes()).hexdigest()[:16], n, False, view, file=file)
