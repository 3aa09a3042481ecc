"""Computes columns of features from images, chunk by chunk: in this process, on ranks, or on Ray actors.

All three yield (first sample, columns) of the same chunks; a chunk does not depend on who computed it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from diffscale.evaluation.image_sources import ImageSource
from diffscale.evaluation.networks.resize import upsample
from diffscale.evaluation.networks.weights import OFFLINE, WEIGHTS
from diffscale.evaluation.sampling import ModelSource
from diffscale.kernels.runtime import keep_freed_memory

if TYPE_CHECKING:
    from diffscale.evaluation.networks.extractor import Extractor

Columns = dict[str, NDArray]
Gather = Callable[[Any], list[Any]]
StopRequested = Callable[[], bool]
LEAST_CHUNK = 64
IMAGES, LABELS = "images", "labels"
FINITE = "finite"  # column of a model's samples: 1, or 0 for a sample with a pixel that is nan or infinite


class Stopped(Exception):
    """Generation was stopped between two chunks, the same ones on every rank; completed chunks are kept."""


@dataclass(frozen=True)
class View:
    """A feature network and how images reach it."""

    network: str
    resolution: int  # side in pixels at which images are compared
    resize: str = "default"  # from there to the network's input
    outputs: tuple[str, ...] = ("features",)
    weights: str = ""  # digits of a person's own file with weights; empty for the published ones

    @property
    def recorded_network(self) -> str:
        """The network's name in records, with the weights unless they are the published ones."""
        return f"{self.network}@{self.weights}" if self.weights else self.network

    def column(self, output: str = "features") -> str:
        return f"{self.network}@{self.resolution}/{output}"


class Featuriser:
    """Extractors of the views on one device; the weights are loaded once for each network."""

    def __init__(self, views: Sequence[View], device: torch.device | str = "cpu") -> None:
        from diffscale.evaluation.networks.extractor import create_extractor  # import cost

        self.views = tuple(views)
        outputs: dict[tuple[str, str], set[str]] = {}
        for v in self.views:
            outputs.setdefault((v.network, v.resize), set()).update(v.outputs)
        self._extractors: dict[tuple[str, str], Extractor] = {
            (network, resize): create_extractor(network, device, resize=resize, outputs=sorted(names))
            for (network, resize), names in outputs.items()
        }

    def with_weights(self, view: View) -> View:
        """Return a view that names the weights that were loaded for it."""
        return replace(view, weights=self._extractors[view.network, view.resize].weights)

    def dim(self, view: View, output: str) -> int:
        """Return the length of an output's vectors."""
        return self._extractors[view.network, view.resize].dims[output]

    def only(self, view: View) -> Featuriser:
        """Return the same loaded networks for one view."""
        other = Featuriser([])
        other.views, other._extractors = (view,), self._extractors
        return other

    def __call__(self, source: ImageSource, first: int, last: int, keep_images: bool = False) -> Columns:
        """Return the columns of samples first … last−1: labels, each view's outputs and, if kept, images (n, C·H·W).

        Those of a model have the column FINITE too.
        """
        columns: Columns = {}
        if isinstance(source, ModelSource):
            images, labels, finite = source.samples(first, last)
            columns[FINITE] = finite.long().numpy()
        else:
            images, labels = source.images(first, last)
        columns[LABELS] = labels.numpy()
        for v in self.views:
            out = self._extractors[v.network, v.resize](upsample(images, v.resolution))
            columns |= {v.column(name): out[name].numpy() for name in v.outputs}
        if keep_images:
            columns[IMAGES] = images.contiguous().flatten(1).cpu().numpy()
        return columns


def chunk_ranges(n: int, batch: int, have: Mapping[int, int] = {}) -> list[tuple[int, int]]:
    """Return (first, end) of the chunks of n samples that `have` (first → end) does not cover.

    A chunk has whole batches, at least 64 samples.
    """
    size = batch * -(-LEAST_CHUNK // batch)
    everything = [(first, min(first + size, n)) for first in range(0, n, size)]
    return [(first, end) for first, end in everything if have.get(first, 0) < end]


def run_local(
    source: ImageSource,
    featurise: Featuriser,
    ranges: Sequence[tuple[int, int]],
    keep_below: int = 0,
    stop_requested: StopRequested = lambda: False,
) -> Iterator[tuple[int, Columns]]:
    """Compute chunks one after the other. Images are kept of chunks that begin below `keep_below`.

    stop_requested: returns whether to stop; then Stopped is raised before the next chunk.
    """
    for first, last in ranges:
        if stop_requested():
            raise Stopped
        yield first, featurise(source, first, last, first < keep_below)


def run_on_ranks(
    source: ImageSource,
    featurise: Featuriser,
    ranges: Sequence[tuple[int, int]],
    rank: int,
    world: int,
    gather: Gather,
    keep_below: int = 0,
    stop_requested: StopRequested = lambda: False,
    to_first: Gather | None = None,
) -> Iterator[tuple[int, Columns]]:
    """Share the chunks among the ranks of a training job, in rounds; every rank calls it, rank 0 gets the pairs.

    Where the model is sharded, every rank draws as many batches in a round as any other, without use if it has fewer.

    gather: an object of each rank → all of them, a collective.
    stop_requested: as above; a request on one rank stops all.
    to_first: as `gather`, but may return nothing on the other ranks: features go to rank 0 alone. None: `gather`.
    """
    for start in range(0, len(ranges), world):
        mine = ranges[start + rank : start + rank + 1]
        done = [(first, featurise(source, first, last, first < keep_below)) for first, last in mine]
        if isinstance(source, ModelSource) and source.sharded:
            most = max(source.batches(*chunk) for chunk in ranges[start : start + world])
            for _ in range(most - sum(source.batches(*chunk) for chunk in mine)):
                source.draw(torch.arange(source.batch))
        everyone = (to_first or gather)(done)
        if rank == 0:
            yield from (pair for part in everyone for pair in part)
        if any(gather(stop_requested())):
            raise Stopped


def run_on_ray(
    source: ImageSource,
    views: Sequence[View],
    ranges: Sequence[tuple[int, int]],
    *,
    workers: int,
    gpu: float = 0,
    threads: int = 1,
    keep_below: int = 0,
) -> Iterator[tuple[int, Columns]]:
    """Compute the chunks on `workers` Ray actors, in the order of completion.

    A lost actor is restarted and its chunk computed again.

    gpu: GPUs of each actor, or a part of one; 0 for none.
    threads: of each actor, the same for any number of workers: sums inside a convolution may depend on it.
    """
    import ray  # import cost

    if isinstance(source, ModelSource):
        source = replace(source, model=source.model.cpu(), device="cuda" if gpu else "cpu")
        if source.sampling.guidance.model is not None:
            source.sampling.guidance.model.cpu()
    shared = [ray.put(source)]
    options: dict[str, Any] = {"num_cpus": threads, "num_gpus": float(gpu), "max_restarts": 3, "max_task_retries": 3}
    environment = {name: os.environ[name] for name in (WEIGHTS, OFFLINE) if name in os.environ}
    if environment:  # a running cluster does not know of --weights
        options["runtime_env"] = {"env_vars": environment}
    actor: Any = ray.remote(_Actor)
    actors: list[Any] = [
        actor.options(**options).remote(tuple(views), "cuda" if gpu else "cpu", threads) for _ in range(workers)
    ]
    waiting = list(reversed(ranges))
    running: dict[Any, tuple[int, Any]] = {}
    try:
        for _ in range(2):  # two chunks for each actor: the next starts while the last one is sent
            for a in actors:
                if waiting:
                    first, last = waiting.pop()
                    running[a.run.remote(shared, first, last, first < keep_below)] = (first, a)
        while running:
            (done,), _ = ray.wait(list(running), num_returns=1)
            first, a = running.pop(done)
            if waiting:
                following, last = waiting.pop()
                running[a.run.remote(shared, following, last, following < keep_below)] = (following, a)
            yield first, ray.get(done)
    finally:
        for a in actors:
            ray.kill(a)


def devices(workers: int = 0) -> tuple[int, str]:
    """Return (number of actors, "cuda" or "cpu") for the cluster: `workers`, or one for each GPU, or else CPU."""
    import ray  # import cost

    resources = ray.cluster_resources()
    gpus = int(resources.get("GPU", 0))
    return workers or gpus or max(int(resources.get("CPU", 1)), 1), "cuda" if gpus else "cpu"


class _Actor:
    """The Ray actor: opens the source and the extractors once, and once more after a restart."""

    def __init__(self, views: Sequence[View], device: str, threads: int) -> None:
        torch.set_num_threads(threads)
        keep_freed_memory()
        self.source: ImageSource | None = None
        self.featurise = Featuriser(views, device)

    def run(self, shared: list[Any], first: int, last: int, keep_images: bool) -> Columns:
        """Compute one chunk. shared: the source's reference in a list, which Ray does not resolve."""
        import ray  # import cost

        if self.source is None:
            self.source = ray.get(shared[0])
        return self.featurise(self.source, first, last, keep_images)


def kept_images(columns: Columns, shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Return the images (n,H,W,C) uint8 and labels (n,) of a chunk that kept them. shape: (C,H,W)."""
    images = columns[IMAGES].reshape(-1, *shape).transpose(0, 2, 3, 1)
    return np.ascontiguousarray(images), columns[LABELS]
