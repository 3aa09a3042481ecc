"""The loss on held-out images with fixed noise."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache

import torch
from torch import nn

from diffscale.core.keyed_random import Stream, normal
from diffscale.core.progress import working
from diffscale.data import Dataset
from diffscale.data.loading.latents import draw_latents
from diffscale.diffusion import Diffusion, training_loss
from diffscale.training.numerics import Numerics
from diffscale.training.parallel import World
from diffscale.training.step import QUARTILES

log = logging.getLogger(__name__)
VALIDATION_IMAGES = 1024


@torch.no_grad()
def validation_loss(
    model: nn.Module,
    held: Dataset | None,
    diffusion: Diffusion,
    numerics: Numerics,
    world: World,
    *,
    batch: int,
    threads: int,
) -> tuple[float | None, list[float] | None]:
    """Return the mean loss on held-out images, and its means in quartiles of the noise level.

    The quartiles go from the lowest logsnr to the highest. None without held-out images, and for a network with classes
    if these have no labels. Each rank computes its share.

    held: the held-out images at the training resolution.
    batch: images in one pass.
    threads: those of a training worker, since sums depend on their number.
    """
    if held is None:
        return None, None
    if getattr(model, "num_classes", 0) > 0 and not held.num_classes:
        if world.rank == 0:
            _tell_lack_of_labels()
        return None, None
    sharded = hasattr(model, "set_requires_gradient_sync")
    if not sharded:
        model.to(world.device)
    n = min(held.n, VALIDATION_IMAGES)
    first, last = world.share(n)
    end = first + -(-n // world.size) if sharded else last  # all ranks make the passes of the largest share
    sums = torch.zeros(2, QUARTILES, dtype=torch.float64, device=world.device)
    with _threads(threads), working("validation loss", last - first) as work:
        for start in range(first, end, batch):
            count = min(start + batch, last) - start
            positions = torch.arange(start, start + count) if count > 0 else torch.zeros(1, dtype=torch.int64)
            stored, labels = held.gather(positions.numpy())
            if held.is_latent:
                images = draw_latents(stored, held.encoding, 0, positions)
            else:
                images = stored.permute(0, 3, 1, 2).float() / 127.5 - 1
            place = positions.to(world.device)
            u = ((place * 0.6180339887498949) % 1).float().clamp(1e-4, 1 - 1e-4)  # spread evenly, whatever n is
            noise = normal(0, Stream.VALIDATION, place, tuple(images.shape[1:]))
            label = labels.to(world.device) if getattr(model, "num_classes", 0) else None
            with numerics.autocast(world.device, sharded):
                terms = training_loss(diffusion, model, images.to(world.device), u=u, noise=noise, label=label)
            if count <= 0:
                continue
            quartile = QUARTILES - 1 - (u * QUARTILES).long().clamp(max=QUARTILES - 1)
            sums[0].index_add_(0, quartile, terms.loss.double())
            sums[1].index_add_(0, quartile, torch.ones_like(terms.loss, dtype=torch.float64))
            work.advance(len(positions))
    total, count = world.sum(sums).cpu()
    return float(total.sum() / count.sum()), (total / count.clamp(min=1)).tolist()


@lru_cache
def _tell_lack_of_labels() -> None:
    """Log it once in a process."""
    log.warning("the held-out images have no labels (missing or -1): there is no validation loss")


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
