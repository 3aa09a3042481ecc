"""One optimisation step, without Ray: random draws by (seed, position), passes over micro-batches, one update."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from diffscale.config.experiment import Experiment
from diffscale.core.hashing import GOLDEN, MASK, splitmix64
from diffscale.core.keyed_random import Stream, normal, stratified_uniform, uniform
from diffscale.diffusion import Diffusion, training_loss
from diffscale.training.ema import Ema
from diffscale.training.numerics import Numerics
from diffscale.training.optimizer import create_optimizer
from diffscale.training.parallel import FlatGradients, Gradients, ShardedGradients, World, passes
from diffscale.training.plan import learning_rate

Clock = Callable[[], float]
Extra = Mapping[str, Tensor]
QUARTILES = 4

# The numbers that one collective call sums over the workers in each step.
LOSS_SUM, CLOCK, STOP = 0, 1, 2  # rank 0 alone fills in CLOCK and STOP
LOSS_BY_QUARTILE = slice(3, 3 + QUARTILES)
COUNT_BY_QUARTILE = slice(3 + QUARTILES, 3 + 2 * QUARTILES)
REDUCED = 3 + 2 * QUARTILES


class Batch(Protocol):
    """This worker's share of a global batch."""

    @property
    def images(self) -> Tensor: ...  # (b, C, H, W) float in [−1, 1]
    @property
    def labels(self) -> Tensor: ...  # (b,) int64
    @property
    def positions(self) -> Tensor: ...  # (b,) int64


@dataclass(frozen=True)
class Step:
    """The result of one step, the same on every worker. Losses are means over the global batch."""

    images_seen: int
    loss: float
    quartile_sums: tuple[float, ...]  # loss summed over samples by quartile of the noise level, clean to noisy
    quartile_counts: tuple[float, ...]
    grad_norm: float
    lr: float
    skipped: bool  # loss or gradient was not finite, so nothing was updated
    overflow: bool  # fp16 alone: the gradient was too large for the loss scale, which was halved
    clock: float  # rank 0's clock in seconds
    stop: int  # rank 0's stop request (control.py); 0 for none


@dataclass
class LossScale:
    """Loss scale for fp16 training: halved on overflow, doubled after 2,000 steps without one.

    torch.amp.GradScaler decides on each rank; here the norm of the summed gradient decides, so all ranks agree.
    """

    value: float = 2.0**16
    good: int = 0

    def update(self, finite: bool) -> None:
        """Adapt the scale after a step whose gradient was finite or not."""
        self.good = self.good + 1 if finite else 0
        if not finite:
            self.value = max(self.value / 2, 1.0)
        elif self.good == 2000:
            self.value, self.good = self.value * 2, 0


class Learner:
    """Owner of what a step changes: weights, optimizer, averages, loss scale and `images_seen`."""

    def __init__(
        self,
        model: nn.Module,
        diffusion: Diffusion,
        experiment: Experiment,
        world: World = World(),  # noqa: B008 (frozen)
        numerics: Numerics = Numerics(),  # noqa: B008 (frozen)
        num_classes: int = 0,
        end: int | None = None,
    ) -> None:
        """Create the optimizer, the averages and the gradients' buffer.

        model: on its device, in its memory format, sharded already if `train.parallel=fsdp2`
        num_classes: number of classes that the model is conditioned on; 0 for none
        end: images of the whole run, for the learning rate
        """
        self.model, self.diffusion, self.experiment, self.world = model, diffusion, experiment, world
        self.numerics, self.num_classes, self.end = numerics, num_classes, end
        self.images_seen = 0
        self.optimizer = create_optimizer(model, experiment.optim)
        self.ema = Ema(model, experiment.train.ema)
        self.sharded = experiment.train.parallel == "fsdp2" and hasattr(model, "set_requires_gradient_sync")
        kind = ShardedGradients if self.sharded else FlatGradients
        self.gradients: Gradients = kind(model, world)
        self.scale = LossScale() if numerics.precision == "fp16" and world.device.type == "cuda" else None
        self._passes = passes(experiment.train.global_batch, world.size, experiment.train.pass_images)

    # ---- one step

    def step(self, batch: Batch, *, extra: Extra | None = None, clock: Clock | None = None, stop: int = 0) -> Step:
        """Make one update from this worker's share of the global batch at `images_seen`.

        extra: further tensors for the model, one row per sample (augmentation labels)
        clock: returns rank 0's clock, called after the passes; all ranks receive it in the Step
        stop: rank 0's stop request; all ranks receive it in the Step
        """
        train, optim = self.experiment.train, self.experiment.optim
        lr = learning_rate(optim, self.images_seen, train.global_batch, self.end)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.model.train()
        if self.sharded and hasattr(self.model, "project_weights"):
            self.model.project_weights()  # type: ignore[operator]
        self.gradients.begin()
        sums = torch.zeros(REDUCED, dtype=torch.float64, device=self.world.device)
        for i, (first, last, weight) in enumerate(self._micro_batches(len(batch.positions))):
            self.gradients.expect(last=i == self._passes - 1)
            self._pass(batch, slice(first, last), weight, extra or {}, sums)
        if self.world.rank == 0:
            sums[CLOCK], sums[STOP] = clock() if clock else 0.0, stop
        self.world.sum(sums)
        norm = self.gradients.finish()
        factor = self.scale.value if self.scale else 1.0
        reduced = sums.tolist()
        loss_sum = reduced[LOSS_SUM]
        grad_norm = float(norm) / factor
        finite = math.isfinite(loss_sum) and math.isfinite(grad_norm)
        overflow = self.scale is not None and math.isfinite(loss_sum) and not finite and self.scale.value > 1
        if finite:
            if optim.clip_grad_norm is not None and grad_norm > optim.clip_grad_norm:
                factor *= grad_norm / optim.clip_grad_norm
            if factor != 1:
                self.gradients.scale(1 / factor)
            self.optimizer.step()
        if self.scale and math.isfinite(loss_sum):
            self.scale.update(finite)
        self.images_seen += train.global_batch
        self.ema.update(self.images_seen, train.global_batch)
        return Step(
            images_seen=self.images_seen,
            loss=loss_sum / train.global_batch,
            quartile_sums=tuple(reduced[LOSS_BY_QUARTILE]),
            quartile_counts=tuple(reduced[COUNT_BY_QUARTILE]),
            grad_norm=grad_norm,
            lr=lr,
            skipped=not finite and not overflow,
            overflow=overflow,
            clock=reduced[CLOCK],
            stop=int(reduced[STOP]),
        )

    def _micro_batches(self, count: int) -> Iterator[tuple[int, int, float]]:
        """Yield (first, last, weight) of each pass.

        A worker with a smaller share makes its last passes over one sample of weight zero, so that all workers make the
        same number of passes.
        """
        size = self.experiment.train.pass_images or max(count, 1)
        for i in range(self._passes):
            first, last = min(i * size, count), min((i + 1) * size, count)
            yield (first, last, 1.0) if first < last else (0, 1, 0.0)

    def _pass(self, batch: Batch, part: slice, weight: float, extra: Extra, sums: Tensor) -> None:
        device = self.world.device
        positions = batch.positions[part].to(device)
        images = self.numerics.order(batch.images[part].to(device, non_blocking=True))
        more = {name: tensor[part].to(device) for name, tensor in extra.items()}
        u, noise, label, keep = self.draw_noise(positions, images.shape[1:], batch.labels[part].to(device))
        noise = self.numerics.order(noise)
        torch.manual_seed(_generator_seed(self.experiment.train.seed, int(batch.positions[part][0])))
        with self.numerics.autocast(device, self.sharded):
            terms = training_loss(
                self.diffusion, self.model, images, u=u, noise=noise, label=label, self_cond_keep=keep, **more
            )
        loss = terms.loss.sum() * weight
        (loss * ((self.scale.value if self.scale else 1.0) / self.experiment.train.global_batch)).backward()
        with torch.no_grad():
            values = terms.loss.detach().double() * weight
            sums[LOSS_SUM] += values.sum()
            # The quartile of t is the quartile of the noise level: logsnr falls with t.
            quartile = (u * QUARTILES).long().clamp(max=QUARTILES - 1)
            sums[LOSS_BY_QUARTILE].index_add_(0, quartile, values)
            sums[COUNT_BY_QUARTILE].index_add_(0, quartile, torch.full_like(values, weight))

    def draw_noise(
        self, positions: Tensor, shape: tuple[int, ...], labels: Tensor
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """Draw what is random in the loss, as a function of (seed, position) alone.

        Returns the place of the noise level in its distribution (b,) in [0, 1), the noise (b, *shape), the labels (b,)
        or None, and whether each sample keeps carried state (b,) or None.

        positions: (b,) int64, places of the samples in the run's sequence
        shape: (C, H, W)
        labels: (b,) int64
        """
        d, train = self.experiment.diffusion, self.experiment.train
        if d.stratified:
            u = stratified_uniform(train.seed, positions, train.global_batch)
        else:
            u = uniform(train.seed, Stream.TIME, positions)
        noise = normal(train.seed, Stream.NOISE, positions, tuple(shape))
        label = None
        if self.num_classes:
            dropped = uniform(train.seed, Stream.LABEL_DROP, positions) < d.label_drop
            label = torch.where(dropped, torch.full_like(labels, self.num_classes), labels)
        keep = None
        if getattr(self.model, "carries_state", False):
            keep = uniform(train.seed, Stream.SELF_COND, positions) < d.self_condition
        return u, noise, label, keep

    # ---- state, for checkpoints

    def scalars(self) -> dict[str, Any]:
        """Return the part of the state that state.json holds."""
        scale = {"value": self.scale.value, "good": self.scale.good} if self.scale else None
        return {"images_seen": self.images_seen, "loss_scale": scale}

    def load_scalars(self, scalars: dict[str, Any]) -> None:
        """Restore what `scalars` returned."""
        self.images_seen = int(scalars["images_seen"])
        if self.scale and scalars.get("loss_scale"):
            self.scale = LossScale(**scalars["loss_scale"])


def _generator_seed(seed: int, position: int) -> int:
    """Mix two numbers into a seed for torch's generator."""
    return splitmix64((seed * GOLDEN + position) & MASK) >> 1
