"""One evaluation from end to end: samples → features → values.

Training, Ray actors, the commands and folders of images all use it.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from diffscale.config.factory import data_place, open_decoder, trained_images
from diffscale.core import image_grids
from diffscale.core.errors import UserError
from diffscale.core.hashing import file_sha256, identify
from diffscale.core.progress import working
from diffscale.data import open_dataset
from diffscale.diffusion import Diffusion
from diffscale.diffusion.solver_settings import SolverSettings
from diffscale.evaluation.distribute import (
    IMAGES,
    LABELS,
    Columns,
    Featuriser,
    Gather,
    StopRequested,
    View,
    chunk_ranges,
    run_local,
    run_on_ranks,
    run_on_ray,
)
from diffscale.evaluation.feature_store import FeatureStore, ends, fetch_chunks, write_chunk
from diffscale.evaluation.image_sources import Images, ImageSource, select_images
from diffscale.evaluation.metrics.registry import (
    LEAST_HELDOUT,
    NEED_FEATURES,
    Measurement,
    Metric,
    check_counts,
    measure,
    memorised,
    nearest_samples,
    other_network,
    parse_metric,
    per_class,
    views_of,
)
from diffscale.evaluation.metrics.statistics import load_moments
from diffscale.evaluation.networks.resize import upsample
from diffscale.evaluation.published import published_of, refuse_other_protocol, statistics_file
from diffscale.evaluation.reference import (
    Reference,
    get_reference,
    no_features,
    reference_from_npz,
    reference_rows,
    references_folder,
)
from diffscale.evaluation.sampling import ModelSource, Sampling, sampling_of_settings

if TYPE_CHECKING:
    from diffscale.config.experiment import EvalSettings, Experiment
    from diffscale.data import Dataset
    from diffscale.data.autoencoder import Decoder

Ranges = Sequence[tuple[int, int]]
FEW_CHUNKS = 16


@dataclass(frozen=True)
class Evaluation:
    """The result of one evaluation."""

    measurements: list[Measurement]  # rows for records, empty on ranks other than 0
    grid_png: bytes | None  # the first samples, labelled
    seconds: float


@dataclass
class Evaluator:
    """Evaluates models or images against one dataset under one set of `eval` settings.

    The constructor loads the feature networks, so that missing weights stop a run before it begins (UserError). In a
    training job of several workers every rank constructs one and calls each method.
    """

    settings: EvalSettings
    dataset: Dataset  # images that the model was trained on, at its resolution; of latents those they stand for
    storage: str  # where references are kept: see references_folder
    heldout: Dataset | None = None  # the held-out split at the resolution of evaluation
    compared: Images | None = None  # the reference images; default: `dataset`, whose resolution must be evaluation's
    device: torch.device | str = "cpu"
    rank: int = 0
    world: int = 1
    gather: Gather | None = None  # takes an object of each rank and returns all of them, a collective call
    to_first: Gather | None = None  # the same for features, which rank 0 alone needs; None: `gather`
    actors: int = 0  # Ray actors that compute features; 0 computes in this process
    actor_gpu: float = 1.0  # GPUs of each actor, where `device` is one
    actor_threads: int = 1
    decoder: Decoder | None = None  # of models of latents
    reference_file: Path | None = None  # published statistics (.npz) in place of the dataset's
    keep_images: Callable[[int, Columns], None] | None = None  # called with every chunk of samples, in any order
    per_class: bool = False  # each metric for each class too
    stop_requested: StopRequested = lambda: False  # called between chunks; then Stopped is raised, chunks are kept
    _references: dict[View, Reference] = field(default_factory=dict)
    _heldout: dict[View, Reference] = field(default_factory=dict)

    def __post_init__(self) -> None:
        resolution = self.settings.eval_resolution or self.dataset.resolution
        self.metrics: list[Metric] = [parse_metric(name) for name in self.settings.metrics]
        self.views = views_of(self.metrics, resolution, self.settings.resize)
        if self.metrics and getattr(self.dataset, "is_latent", False):
            raise UserError(
                setting="data.decoder",
                value=None,
                expected="pixels, or latents that data build --encode made",
                reason="this dataset holds latents of which no decoder is known, and they have no FID",
                fix="evaluate the validation loss alone (eval.metrics=[]), or build the dataset with --encode VAE",
            )
        self.reference_images: Images = self.dataset if self.compared is None else self.compared
        if self.compared is None and self.dataset.resolution != resolution:
            raise _not_built_at(resolution, self.dataset)
        images = self.reference_images.n
        known = None if self.reference_file is not None else min(self.settings.n_reference or images, images)
        check_counts(self.metrics, self.settings.n_generated, known)
        if self.heldout is not None and self.heldout.resolution != resolution:
            raise ValueError(f"held-out images of {self.heldout.resolution} pixels, evaluation at {resolution}")
        # The distance at the training resolution is a second column next to the common one (CONTRIBUTING.md,
        # decision 1).
        self.native: dict[str, View] = {}
        if self.reference_images is not self.dataset:
            fd = [m for m in self.metrics if m.kind == "fd"]
            self.native = views_of(fd, self.dataset.resolution, self.settings.resize)
        # With actors this process may be a driver without the GPU that they have.
        here = "cpu" if self.actors and not torch.cuda.is_available() else self.device
        self._featurise = Featuriser([*self.views.values(), *self.native.values()], here)
        self.views = {name: self._featurise.with_weights(view) for name, view in self.views.items()}
        self.native = {name: self._featurise.with_weights(view) for name, view in self.native.items()}
        self._featurise.views = (*self.views.values(), *self.native.values())
        if self.reference_file is not None:
            self._check_reference_file(self.reference_file)

    def _check_reference_file(self, file: Path) -> None:
        """Raise UserError for statistics that are broken, of another network, or no answer to one of the metrics."""
        side = self.settings.eval_resolution or self.dataset.resolution
        refuse_other_protocol(file, side, self.settings.resize, {m.name: m.network for m in self.metrics})
        for metric in self.metrics:
            if metric.kind in NEED_FEATURES:
                raise no_features(file)
            if metric.kind == "is":
                continue
            (output,), view = metric.outputs, self.views[metric.network]
            have, need = len(load_moments(file, spatial=output == "spatial").mean), self._featurise.dim(view, output)
            if have != need:
                raise other_network(file, view.network, need, have)

    def sampling(self, solver: SolverSettings, *, precision: str = "fp32", carries_state: bool = False) -> Sampling:
        """Return the settings' sampler; see `sampling_of_settings`."""
        n = self.settings.n_generated
        return sampling_of_settings(self.settings, solver, n, precision, carries_state=carries_state)

    def identity(self) -> str:
        """Return a hash of all that decides what an evaluation of given images computes."""
        file = self.reference_file
        return identify(
            metrics=[metric.name for metric in self.metrics],
            views=[str(view) for view in (*self.views.values(), *self.native.values())],
            numbers=[self.settings.n_generated, self.settings.n_reference, self.settings.n_heldout],
            reference=self.reference_images.content_hash if file is None else file_sha256(file),
            heldout=None if self.heldout is None else self.heldout.content_hash,
            per_class=self.per_class,
            grid=self.settings.grid_images,
        )

    def prepare(self) -> None:
        """Compute the reference statistics that are not in the cache; every rank calls it."""
        for view in self.views.values():
            if self.reference_file is not None:
                self._references[view] = reference_from_npz(self.reference_file, view)
            else:
                self._references[view] = self._reference(self.reference_images, view, self.settings.n_reference)
            if self.heldout is not None and self._heldout_images() >= LEAST_HELDOUT:
                self._heldout[view] = self._reference(self.heldout, view, self.settings.n_heldout)
        for view in self.native.values():
            self._references[view] = self._reference(self.dataset, view, self.settings.n_reference)

    def _heldout_images(self) -> int:
        """Return how many held-out images the samples are compared with; too few are none."""
        n, wanted = 0 if self.heldout is None else self.heldout.n, self.settings.n_heldout
        return n if wanted is None else min(n, wanted)

    def _reference(self, images: Images, view: View, n: int | None) -> Reference:
        view = replace(view, outputs=tuple(o for o in view.outputs if o != "logits"))
        return get_reference(
            images,
            view,
            n_reference=n,
            place=references_folder(self.storage),
            compute=self._compute_one,
            rank=self.rank,
            gather=self.gather,
        )

    def _compute_one(self, source: ImageSource, view: View, todo: Ranges) -> Iterator[tuple[int, Columns]]:
        if self.actors and len(todo) <= FEW_CHUNKS:  # done here before actors would have loaded the network
            return run_local(source, self._featurise.only(view), todo)
        return self._compute(source, self._featurise.only(view), todo, 0)

    def _compute(
        self, source: ImageSource, featurise: Featuriser, todo: Ranges, keep: int
    ) -> Iterator[tuple[int, Columns]]:
        """Compute chunks by Ray actors, by the ranks of a training job, or here."""
        if self.actors:
            return run_on_ray(
                source,
                featurise.views,
                todo,
                workers=min(self.actors, max(len(todo), 1)),
                gpu=self.actor_gpu if torch.device(self.device).type == "cuda" else 0,
                threads=self.actor_threads,
                keep_below=keep,
            )
        if self.gather is not None:
            return run_on_ranks(
                source,
                featurise,
                todo,
                self.rank,
                self.world,
                self.gather,
                keep,
                self.stop_requested,
                self.to_first,
            )
        return run_local(source, featurise, todo, keep, self.stop_requested)

    def evaluate(
        self, model: nn.Module, diffusion: Diffusion, sampling: Sampling, *, folder: Path | None = None
    ) -> Evaluation:
        """Generate `eval.n_generated` samples of the model and measure them; every rank calls it.

        model: carries the weights to evaluate (the EMA's), on any device.
        folder: see evaluate_source.
        """
        return self.evaluate_source(self.samples(model, diffusion, sampling), folder=folder)

    def samples(self, model: nn.Module, diffusion: Diffusion, sampling: Sampling) -> ModelSource:
        """Return `eval.n_generated` samples of the model, drawn where they are used."""
        n = self.settings.n_generated
        return ModelSource.of(model, diffusion, sampling, self.dataset, n, self.device, self.decoder)

    def nearest_picture(self, source: ImageSource, folder: Path, count: int) -> bytes:
        """Return a PNG of the `count` images that are nearest to a reference image, each next to that image.

        Distances are those of the first metric's features. Raises UserError for a reference without features.

        folder: that of an evaluation of the same source.
        """
        view = next(iter(self.views.values()))
        generated = FeatureStore(folder, source.n)
        found = nearest_samples(view, generated, self._references[view], self._heldout.get(view), count)
        theirs = reference_rows(self.reference_images.n, self.settings.n_reference)[found.rows]
        right, _ = select_images(self.reference_images, theirs).images(0, len(theirs))
        both = [
            upsample(images, view.resolution).permute(0, 2, 3, 1).numpy()
            for images in (source.at(found.samples), right)
        ]
        return image_grids.to_png(image_grids.pairs(both[0], both[1], found.captions))

    def evaluate_source(
        self, source: ImageSource, *, folder: Path | None = None, kept: str | None = None, lossy: bool | None = None
    ) -> Evaluation:
        """Measure images from anywhere; every rank calls it.

        folder: where features go and from where an interrupted evaluation resumes; None for a temporary one.
        kept: URI of a folder that receives them too, so that another machine can resume.
        lossy: whether the images were stored lossily, where that is known: a warning if the reference was not.
        """
        started = time.monotonic()
        if not self._references:
            self.prepare()
        with _folder(folder) as place:
            self._fill(source, place, kept)
            if self.rank != 0:
                return Evaluation([], None, time.monotonic() - started)
            generated = FeatureStore(place, source.n)
            grid = self._grid(generated, source)
            measurements = self.measure(generated, self.per_class)
            if self.reference_file is not None and (known := published_of(self.reference_file)) is not None:
                measurements = [with_warning(m, known.caveat) for m in measurements]
            if lossy is not None:
                measurements = [self._with_lossy_warning(m, lossy) for m in measurements]
            if 0 < self._heldout_images() < LEAST_HELDOUT:
                measurements = [with_warning(m, "one held-out image is too few to compare with") for m in measurements]
            return Evaluation(measurements, grid, time.monotonic() - started)

    def _fill(self, source: ImageSource, place: Path, kept: str | None) -> None:
        if kept is not None and self.rank == 0:
            fetch_chunks(place, kept)
        have = ends(place)
        if self.gather is not None:
            have = self.gather(have)[0]
        todo = chunk_ranges(source.n, source.batch, have)
        keep = self.settings.grid_images if self.keep_images is None else source.n
        title = "samples" if isinstance(source, ModelSource) else "features"
        with working(title, source.n, done=source.n - sum(end - first for first, end in todo)) as work:
            for first, columns in self._compute(source, self._featurise, todo, keep):
                if self.keep_images is not None:
                    self.keep_images(first, columns)
                    if first >= self.settings.grid_images:
                        columns = {name: values for name, values in columns.items() if name != IMAGES}
                write_chunk(place, first, columns, kept)
                work.advance(len(columns[LABELS]))

    def measure(self, generated: FeatureStore, classes: bool = False) -> list[Measurement]:
        """Return every metric of the settings for stored features; rank 0 only. classes: per class too."""
        out: list[Measurement] = []
        copied: dict[str, float | None] = {}
        with working("metrics", len(self.metrics), "metrics") as work:
            for metric in self.metrics:
                view = self.views[metric.network]
                reference, heldout = self._references[view], self._heldout.get(view)
                if metric.network not in copied:
                    copied[metric.network] = memorised(view, generated, reference, heldout)
                rows = measure(metric, view, generated, reference, heldout)
                native = self.native.get(metric.network)
                if native is not None and metric.kind == "fd":
                    value = measure(metric, native, generated, self._references[native])[0].value
                    rows = [replace(rows[0], value_native=value)]
                out += [replace(row, memorisation=copied[metric.network]) for row in rows]
                if classes:
                    out += per_class(metric, view, generated, reference)
                work.advance()
        return out

    def _with_lossy_warning(self, row: Measurement, lossy: bool) -> Measurement:
        reference = self._references[self.views[row.network]]
        if lossy == reference.lossy or not reference.has_features:
            return row
        return with_warning(row, "only one of samples and reference was stored lossily (JPEG)")

    def _grid(self, generated: FeatureStore, source: ImageSource) -> bytes | None:
        if not self.settings.grid_images or IMAGES not in generated:
            return None
        images = generated[IMAGES][: self.settings.grid_images]
        labels = generated[LABELS][: len(images)]
        side = self.dataset.resolution
        images = images.reshape(len(images), self.dataset.channels, side, side).transpose(0, 2, 3, 1)
        conditional = not isinstance(source, ModelSource) or source.class_counts
        names = self.dataset.class_names if conditional else []
        captions = [names[i] if i < len(names) else "" for i in labels]
        return image_grids.to_png(image_grids.grid(images, captions))


def with_warning(row: Measurement, warning: str) -> Measurement:
    """Return the measurement with one more warning."""
    return replace(row, warning=f"{row.warning}; {warning}" if row.warning else warning)


def make_evaluator(experiment: Experiment, dataset: Dataset, **options: Any) -> Evaluator:
    """Construct the evaluator of an experiment.

    Samples are compared with the training images at `eval.eval_resolution`, or with the statistics of `eval.reference`,
    and with the held-out split of that resolution. Raises UserError where a network's weights are missing or the
    settings do not fit the data.

    dataset: what the model was trained on, pixels or latents.
    options: further arguments of Evaluator, such as `device` and `actors`.
    """
    compared, reference = reference_dataset(experiment, dataset), experiment.eval.reference
    return Evaluator(
        experiment.eval,
        trained_images(experiment, dataset),
        experiment.storage,
        heldout=compared.heldout,
        compared=compared,
        decoder=open_decoder(experiment, dataset),
        reference_file=None if reference is None else statistics_file(reference),
        **options,
    )


def reference_dataset(experiment: Experiment, dataset: Dataset) -> Dataset:
    """Return the training images at `eval.eval_resolution`, which samples are compared with.

    Of latents these are the images that they were encoded from. Raises UserError if the dataset was not built at it.
    """
    dataset, resolution = trained_images(experiment, dataset), experiment.eval.eval_resolution
    if resolution is None or resolution == dataset.resolution:
        return dataset
    found = open_dataset(data_place(experiment, resolution))
    if found.resolution != resolution:
        raise _not_built_at(resolution, dataset)
    return found


def _not_built_at(resolution: int, dataset: Dataset) -> UserError:
    return UserError(
        setting="eval.eval_resolution",
        value=resolution,
        expected=f"a resolution that the dataset was built at (this one: {dataset.resolution})",
        fix="build the dataset at both resolutions: python -m diffscale.data build ... --resolution",
    )


@contextmanager
def _folder(folder: Path | None) -> Iterator[Path]:
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="diffscale-evaluation-") as temporary:
        yield Path(temporary)
