"""The loader `data.loader: ray_data`: the same batches, gathered and decoded by Ray Data on other machines.

It serves clusters whose accelerator machines have too few cores to decode. Each worker streams its share through
`streaming_split(1)` of an ordered pipeline over the steps of the run.

It has the guarantees of the memory-mapped loader: the same image at the same position, identical global batches on any
number of workers, every image once per epoch, and resumption from `images_seen`. One `streaming_split(world)` over a
shuffled dataset has none of them: the assignment of blocks to workers depends on timing, `equal=True` drops rows, and
nothing resumes inside an epoch.

It lacks the memory map's speed for small images (benchmarks/results/throughput has both). Its first batch takes
seconds, and a pipeline ends with its worker: after a failure its blocks are computed again. All nodes must reach the
dataset.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import numpy as np
import torch

from diffscale.data.format.dataset import Dataset
from diffscale.data.loading.loader import Loader, Stored
from diffscale.data.loading.order import positions_to_indices

SEGMENT = 1024  # steps of one pipeline
BLOCK = 4  # steps of one task


class RayDataLoader(Loader):
    """A Loader whose rows are gathered by Ray Data tasks. It takes the same arguments; Ray must be initialised."""

    def _stored(self, pinned: bool) -> Iterator[Stored]:
        import ray  # import cost
        from ray.data import DataContext  # import cost

        context = DataContext.get_current()
        context.execution_options.preserve_order = True  # set before the pipeline is built
        context.enable_progress_bars = False
        share = len(self.share)
        reference = ray.put(self.dataset)
        base = self.start
        while share and (self.stop is None or base < self.stop):
            steps = SEGMENT if self.stop is None else min(SEGMENT, -(-(self.stop - base) // self.global_batch))
            fetch = self._fetch(reference, base)
            pipeline = ray.data.range(steps, override_num_blocks=-(-steps // BLOCK)).map_batches(fetch, batch_size=1)
            for batch in pipeline.streaming_split(1)[0].iter_batches(batch_size=share, batch_format="numpy"):
                images = torch.from_numpy(np.array(batch["image"]))  # a copy: Ray's is read-only
                labels = torch.from_numpy(np.array(batch["label"]))
                positions = np.array(batch["position"], np.int64)
                self._verify_used(positions_to_indices(positions, self.dataset.n, self.seed, **self.form))
                yield positions, images.pin_memory() if pinned else images, labels
            base += steps * self.global_batch
        if not share:  # a worker with an empty share still takes every step
            yield from super()._stored(pinned)

    def _fetch(self, reference: Any, base: int):
        """Return the function that a task runs for one step: it gathers the rows of this worker's share."""
        share, stop, batch, seed, form = self.share, self.stop, self.global_batch, self.seed, self.form

        def fetch(step: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
            dataset = _opened(reference)
            positions = base + int(step["id"][0]) * batch + share
            if stop is not None:
                positions = positions[positions < stop]
            indices = positions_to_indices(positions, dataset.n, seed, **form)
            images, labels = dataset.gather(indices)
            return {"image": images.numpy(), "label": labels.numpy(), "position": positions}

        return fetch


@lru_cache(maxsize=2)
def _opened(reference: Any) -> Dataset:
    """Return the dataset, opened once in each process that runs tasks."""
    import ray  # import cost

    return ray.get(reference)
