"""One evaluation from end to end: samples → features → values. Used inside training, by Ray actors and by the CLI."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from diffscale.core.errors import UserError
from diffscale.diffusion import Diffusion, Guidance
from diffscale.diffusion.solver_settings import SolverSettings
from diffscale.evaluation import distribute as generate
from diffscale.evaluation import feature_store as spool
from diffscale.evaluation import pictures
from diffscale.evaluation.distribute import Columns, Featuriser, Gather, View
from diffscale.evaluation.feature_store import Spool
from diffscale.evaluation.image_sources import (
    ModelSource,
    Sampling,
    Source,
    class_counts,
    source_of,
    to_uint8,
)
from diffscale.evaluation.metrics.registry import (
    LEAST,
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
from diffscale.evaluation.reference import (
    Reference,
    get_reference,
    reference_from_npz,
    reference_rows,
    references_folder,
)

if TYPE_CHECKING:
    from diffscale.config.experiment import EvalSettings
    from diffscale.data import Dataset

Ranges = Sequence[tuple[int, int]]
FEW_CHUNKS = 16


@dataclass(frozen=True)
class Evaluation:
    """measurements: rows for records, empty on ranks other than 0. grid_png: the first samples, labelled."""

    measurements: list[Measurement]
    grid_png: bytes | None
    seconds: float


@dataclass
class Evaluator:
    """Evaluates models against one dataset under one set of `eval` settings.

    Making it loads the feature networks, so that missing weights stop a run before it begins (UserError).
    dataset: what the model was trained on, at its resolution. at_eval_resolution: the same images at
    `eval.eval_resolution`, where that is set and higher. heldout: the held-out split at the resolution of evaluation.
    rank, world, gather: for a training job of several workers, where every rank makes one and calls each method;
    gather takes an object of each rank and gives all of them (a collective). actors: Ray actors that generate, 0 for
    this process. reference_file: published statistics (.npz) in place of the dataset's. keep_images: called with every
    chunk, in any order, for keeping the images. per_class: each metric for each class too. asked: whether to stop,
    called between chunks; then what runs here or on ranks raises generate.Stopped, and goes on from there when it is
    called again with the same folder.
    """

    settings: EvalSettings
    dataset: Dataset
    storage: str
    heldout: Dataset | None = None
    at_eval_resolution: Dataset | None = None
    device: torch.device | str = "cpu"
    rank: int = 0
    world: int = 1
    gather: Gather | None = None
    actors: int = 0
    reference_file: Path | None = None
    keep_images: Callable[[int, Columns], None] | None = None
    per_class: bool = False
    asked: generate.Asked = lambda: False
    _references: dict[View, Reference] = field(default_factory=dict)
    _heldout: dict[View, Reference] = field(default_factory=dict)

    def __post_init__(self) -> None:
        resolution = self.settings.eval_resolution or self.dataset.resolution
        self.metrics: list[Metric] = [parse_metric(name) for name in self.settings.metrics]
        for metric in self.metrics:
            if 0 < self.settings.n_generated < LEAST[metric.kind]:
                expected = f"at least {LEAST[metric.kind]} for {metric.name}"
                raise UserError(setting="eval.n_generated", value=self.settings.n_generated, expected=expected)
        self.views = views_of(self.metrics, resolution, self.settings.resize)
        if self.metrics and self.dataset.is_latent:
            raise UserError(
                setting="data.decoder",
                value=None,
                expected="pixels: this dataset holds latents, which have no FID",
                fix="evaluate the validation loss alone (eval.metrics=[]), or train on pixels",
            )
        compared = self.dataset if resolution == self.dataset.resolution else self.at_eval_resolution
        if compared is None or compared.resolution != resolution:
            raise UserError(
                setting="eval.eval_resolution",
                value=resolution,
                expected=f"a resolution that the dataset was built at (this one: {self.dataset.resolution})",
                fix="build the dataset at both resolutions: python -m diffscale.data build ... --resolution",
            )
        self.compared: Dataset = compared
        # The native distance is a second column beside the common one (DECISIONS 1).
        self.native: dict[str, View] = {}
        if resolution != self.dataset.resolution:
            fd = [m for m in self.metrics if m.kind == "fd"]
            self.native = views_of(fd, self.dataset.resolution, self.settings.resize)
        # With actors this process may be a driver without the GPU that they have.
        here = "cpu" if self.actors and not torch.cuda.is_available() else self.device
        self._featurise = Featuriser([*self.views.values(), *self.native.values()], here)

    def sampling(self, solver: SolverSettings, *, precision: str = "fp32") -> Sampling:
        """The settings' sampler: solver's name, seed, batch and guidance as in `eval`."""
        s = self.settings
        guidance = Guidance(s.guidance_scale, s.guidance_interval)
        batch = max(min(s.batch, s.n_generated), 1)
        return Sampling(solver, s.solver.name, s.seed, batch, guidance, precision=precision)

    def prepare(self) -> None:
        """Builds the reference statistics that are not in the cache; every rank calls it."""
        for view in self.views.values():
            if self.reference_file is not None:
                self._references[view] = reference_from_npz(self.reference_file, view)
            else:
                self._references[view] = self._reference(self.compared, view, self.settings.n_reference)
            if self.heldout is not None and self.settings.n_heldout != 0:
                self._heldout[view] = self._reference(self.heldout, view, self.settings.n_heldout)
        for view in self.native.values():
            self._references[view] = self._reference(self.dataset, view, self.settings.n_reference)

    def _reference(self, dataset: Dataset, view: View, n: int | None) -> Reference:
        view = replace(view, outputs=tuple(o for o in view.outputs if o != "logits"))
        return get_reference(
            dataset,
            view,
            n_reference=n,
            place=references_folder(self.storage),
            compute=self._compute_one,
            rank=self.rank,
            gather=self.gather,
        )

    def _compute_one(self, source: Source, view: View, todo: Ranges) -> Iterator[tuple[int, Columns]]:
        if self.actors and len(todo) <= FEW_CHUNKS:  # done here before actors would have loaded the network
            return generate.in_process(source, self._featurise.only(view), todo)
        return self._compute(source, self._featurise.only(view), todo, 0)

    def _compute(self, source: Source, featurise: Featuriser, todo: Ranges, keep: int) -> Iterator[tuple[int, Columns]]:
        """Chunks by Ray actors, by the ranks of a training job, or here."""
        if self.actors:
            return generate.on_ray(
                source,
                featurise.views,
                todo,
                workers=min(self.actors, max(len(todo), 1)),
                gpu=torch.device(self.device).type == "cuda",
                keep_below=keep,
            )
        if self.gather is not None:
            return generate.over_ranks(source, featurise, todo, self.rank, self.world, self.gather, keep, self.asked)
        return generate.in_process(source, featurise, todo, keep, self.asked)

    def evaluate(
        self, model: nn.Module, diffusion: Diffusion, sampling: Sampling, *, folder: Path | None = None
    ) -> Evaluation:
        """Generates `eval.n_generated` samples of the model and measures them; every rank calls it.

        model: carries the weights to be judged (the EMA's), on any device. folder: where features go and from where
        an interrupted evaluation resumes; a temporary one by default.
        """
        source = self._source(model, diffusion, sampling)
        return self.evaluate_source(source, folder=folder)

    def _source(self, model: nn.Module, diffusion: Diffusion, sampling: Sampling) -> ModelSource:
        d = self.dataset
        shape = (d.channels, d.resolution, d.resolution)
        counts = class_counts(d) if getattr(model, "num_classes", 0) else ()
        return ModelSource(model, diffusion, sampling, shape, self.settings.n_generated, counts, str(self.device))

    def nearest_picture(
        self, model: nn.Module, diffusion: Diffusion, sampling: Sampling, folder: Path, count: int
    ) -> bytes:
        """PNG of the `count` samples that are nearest to a training image in feature space, each beside that image.

        folder: that of an evaluation of the same model and sampler. Raises UserError for a reference without features.
        """
        view = next(iter(self.views.values()))
        generated = Spool(folder, self.settings.n_generated)
        found = nearest_samples(view, generated, self._references[view], self._heldout.get(view), count)
        samples, _ = self._source(model, diffusion, sampling).draw(torch.from_numpy(found.samples))
        theirs = reference_rows(self.compared.n, self.settings.n_reference)[found.rows]
        images, _ = source_of(self.compared, theirs).images(0, len(theirs))
        left = upsample(to_uint8(samples).cpu(), self.compared.resolution)
        return pictures.to_png(pictures.pairs(left, images, found.captions))

    def evaluate_source(self, source: Source, *, folder: Path | None = None) -> Evaluation:
        """The same for images from anywhere."""
        started = time.monotonic()
        if not self._references:
            self.prepare()
        with _folder(folder) as place:
            self._fill(source, place)
            if self.rank != 0:
                return Evaluation([], None, time.monotonic() - started)
            generated = Spool(place, source.n)
            grid = self._grid(generated, source)
            measurements = self.measure(generated, self.per_class)
            return Evaluation(measurements, grid, time.monotonic() - started)

    def _fill(self, source: Source, place: Path) -> None:
        have = spool.ends(place)
        if self.gather is not None:
            have = self.gather(have)[0]
        todo = generate.chunk_ranges(source.n, source.batch, have)
        keep = self.settings.grid_images if self.keep_images is None else source.n
        for first, columns in self._compute(source, self._featurise, todo, keep):
            if self.keep_images is not None:
                self.keep_images(first, columns)
                if first >= self.settings.grid_images:
                    columns = {name: values for name, values in columns.items() if name != generate.IMAGES}
            spool.write_chunk(place, first, columns)

    def measure(self, generated: Spool, classes: bool = False) -> list[Measurement]:
        """Every metric of the settings for spooled features, per class too when asked; rank 0 only."""
        out: list[Measurement] = []
        copied: dict[str, float | None] = {}
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
        return out

    def _grid(self, generated: Spool, source: Source) -> bytes | None:
        if not self.settings.grid_images or generate.IMAGES not in generated:
            return None
        images = generated[generate.IMAGES][: self.settings.grid_images]
        labels = generated[generate.LABELS][: len(images)]
        side = self.dataset.resolution
        images = images.reshape(len(images), self.dataset.channels, side, side).transpose(0, 2, 3, 1)
        conditional = not isinstance(source, ModelSource) or source.class_counts
        names = self.dataset.class_names if conditional else []
        captions = [names[i] if i < len(names) else "" for i in labels]
        return pictures.to_png(pictures.grid(images, captions))


@contextmanager
def _folder(folder: Path | None) -> Iterator[Path]:
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="diffscale-evaluation-") as temporary:
        yield Path(temporary)
