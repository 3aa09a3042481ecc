"""One optimisation step, without Ray: random draws by (seed, position), passes over micro-batches, one update.

A step reads nothing from the device. Its decisions (clipping, skipping, the loss scale) are tensors there. What changes
from step to step (learning rate, shares of the averages, clock, stop request) is sent in one copy, and what the host
wants to know comes back in one copy, which it may read later. The same code runs on a CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from diffscale.config.experiment import Experiment
from diffscale.core.hashing import GOLDEN, MASK, splitmix64
from diffscale.core.keyed_random import Stream, stratified_uniform, uniform
from diffscale.diffusion import Diffusion, training_loss
from diffscale.kernels.noise import draw_normal
from diffscale.training.capture import Capture, Recorder, recorder_for
from diffscale.training.compile_turn import CompileTurn
from diffscale.training.ema import Ema
from diffscale.training.low_precision import LowPrecisionWeights, keeps_copies
from diffscale.training.numerics import Numerics
from diffscale.training.optimizer import Update
from diffscale.training.parallel import FlatGradients, Gradients, ShardedGradients, World, passes
from diffscale.training.plan import learning_rate
from diffscale.training.step import (
    BY_QUARTILE,
    CLOCK,
    GRAD_NORM,
    LOSS_SCALE,
    LOSS_SUM,
    MUST_BE_FINITE,
    QUARTILES,
    STATISTICS,
    STOP,
    SUMMED,
    Launched,
    Step,
)

Clock = Callable[[], float]
Tensors = Mapping[str, Tensor]

# What the host sends in each step, float64: these and the shares of the averages.
RATE, TIME, REQUEST, SHARES = 0, 1, 2, 3


class Batch(Protocol):
    """This worker's share of a global batch."""

    @property
    def images(self) -> Tensor: ...  # (b, C, H, W) float in [−1, 1]
    @property
    def labels(self) -> Tensor: ...  # (b,) int64
    @property
    def positions(self) -> Tensor: ...  # (b,) int64


class LossScale:
    """Loss scale for fp16 training: halved on overflow, doubled after 2,000 steps without one.

    torch.amp.GradScaler decides on each rank; here the norm of the summed gradient decides, so all ranks agree.

    value: float64 (), the scale
    good: int64 (), steps since the last overflow or change
    """

    def __init__(self, device: torch.device, value: float = 2.0**16, good: int = 0) -> None:
        self.value = torch.tensor(value, dtype=torch.float64, device=device)
        self.good = torch.tensor(good, device=device)

    def update(self, finite: Tensor, counts: Tensor) -> None:
        """Adapt the scale after a step.

        finite: bool (), whether the gradient was finite
        counts: bool (), whether the loss was; otherwise the step says nothing about the scale
        """
        good = torch.where(finite, self.good + 1, 0)
        full = good == 2000
        value = torch.where(finite, self.value, (self.value / 2).clamp(min=1))
        value = torch.where(full, value * 2, value)
        self.good.copy_(torch.where(counts, torch.where(full, 0, good), self.good))
        self.value.copy_(torch.where(counts, value, self.value))


class Learner:
    """Owner of what a step changes: weights, optimizer, averages, loss scale and `images_seen`.

    holders: number of workers, from rank 0 on, that write a checkpoint together, each its own part
    writers: of those, the workers that write a part of weights and optimizer each
    """

    def __init__(
        self,
        model: nn.Module,
        diffusion: Diffusion,
        experiment: Experiment,
        world: World = World(),  # noqa: B008 (frozen)
        numerics: Numerics = Numerics(),  # noqa: B008 (frozen)
        num_classes: int = 0,
        end: int | None = None,
        recorder: Recorder | None = None,
        copies: bool | None = None,
        turn: CompileTurn | None = None,
    ) -> None:
        """Create the optimizer, the averages and the gradients' buffer.

        model: on its device, in its memory format, sharded already if `train.parallel` says so
        num_classes: number of classes that the model is conditioned on; 0 for none
        end: images of the whole run, for the learning rate
        recorder: records the step's kernels; None for what `train.graph` says
        copies: whether to compute with copies of the weights in low precision; None for where it pays
        turn: of the node's ranks to compile; None if nothing is compiled
        """
        self.model, self.diffusion, self.experiment, self.world = model, diffusion, experiment, world
        self.numerics, self.num_classes, self.end = numerics, num_classes, end
        self.images_seen = 0
        self.model.train()
        self.update = Update(model, experiment.optim, world.device, numerics.products)
        self.optimizer = self.update.optimizer
        self.sharded = experiment.train.sharded and hasattr(model, "set_requires_gradient_sync")
        shared = experiment.train.shard_ema and world.size > 1 and not self.sharded
        self.ema = Ema(model, experiment.train.ema, world if shared else None)
        self.writers = min(experiment.train.checkpoint.parts or self._gigabytes(), world.size)
        self.holders = world.size if shared else self.writers
        self._low: LowPrecisionWeights | None = None
        self.gradients: Gradients
        if self.sharded:
            self.holders = self.writers = world.holders(experiment.train.parallel)
            self.gradients = ShardedGradients(model)
        else:
            self.gradients = flat = FlatGradients(model, world, numerics.reduced_in)
            if keeps_copies(numerics, world.device) if copies is None else copies:
                self._low = LowPrecisionWeights(model, numerics, flat)
        fp16 = numerics.precision == "fp16" and world.device.type == "cuda"
        self.scale = LossScale(world.device) if fp16 else None
        self._statistics = torch.zeros(STATISTICS, dtype=torch.float64, device=world.device)
        self._passes = passes(experiment.train.global_batch, world.size, experiment.train.pass_images)
        # A pass of another size would be compiled and recorded again; otherwise it computes less.
        self._equal_passes = numerics.compile or world.device.type == "cuda"
        self._first = world.share(experiment.train.global_batch)[0]
        self._capture = Capture(recorder or recorder_for(experiment, world))
        self._turn: Callable[[], AbstractContextManager[None]] = nullcontext
        if turn is not None and not self.sharded:
            self._turn = turn.taken

    # ---- one step

    def step(self, batch: Batch, **more: Any) -> Step:
        """`launch` a step and wait for its result."""
        return self.launch(batch, **more).read()

    def launch(
        self,
        batch: Batch,
        *,
        extra: Tensors | None = None,
        numbers: Tensors | None = None,
        clock: Clock | None = None,
        stop: int = 0,
    ) -> Launched:
        """Begin one update from this worker's share of the global batch at `images_seen`, without waiting for it.

        extra: further tensors for the model, one row per sample (augmentation labels)
        numbers: what `draw_numbers` returns for the batch's positions, if it is there already
        clock: returns rank 0's clock, called after the passes; all ranks receive it in the Step
        stop: rank 0's stop request; all ranks receive it in the Step
        """
        train = self.experiment.train
        extra = {f"extra_{name}": tensor for name, tensor in (extra or {}).items()}
        inputs = {
            "images": batch.images,
            "labels": batch.labels,
            "positions": batch.positions,
            **extra,
            **(numbers or {}),
        }
        with self._capture.stream():
            if self.sharded and hasattr(self.model, "project_weights"):
                self.model.project_weights()  # type: ignore[operator]
            for i, (first, last, weight) in enumerate(self._micro_batches(len(batch.positions))):
                part = {k: v[first:last].to(self.world.device, non_blocking=True) for k, v in inputs.items()}
                if self._equal_passes and 0 < last - first < self._size(len(batch.positions)):
                    part, weight = filled_up(part, self._size(len(batch.positions)), weight), 1.0
                seed = _generator_seed(train.seed, self.images_seen + self._first + first)
                seed_dropout(self.world.device, seed)
                self._capture.call(self._pass, weight, i == 0, i == self._passes - 1, **part)
            lr = learning_rate(self.experiment.optim, self.images_seen, train.global_batch, self.end)
            self.images_seen += train.global_batch
            shares = self.ema.shares(self.images_seen, train.global_batch)
            time, request = (clock() if clock else 0.0, float(stop)) if self.world.rank == 0 else (0.0, 0.0)
            sent = to_device([lr, time, request, *shares], self.world.device)
            if self.update.on_device:
                self._capture.call(self._finish, sent=sent)
            else:
                self._finish(sent)
            return Launched(self._statistics, self.images_seen, train.global_batch, lr)

    def _micro_batches(self, count: int) -> Iterator[tuple[int, int, float]]:
        """Yield (first, last, weight) of each pass.

        A worker with a smaller share makes its last passes over one sample of weight zero, so that all workers make the
        same number of passes.
        """
        size = self._size(count)
        for i in range(self._passes):
            first, last = min(i * size, count), min((i + 1) * size, count)
            yield (first, last, 1.0) if first < last else (0, 1, 0.0)

    def _size(self, count: int) -> int:
        """Return the samples of a pass over a share of `count`."""
        return self.experiment.train.pass_images or max(count, 1)

    def _pass(
        self,
        weight: float,
        first: bool,
        last: bool,
        *,
        images: Tensor,
        labels: Tensor,
        positions: Tensor,
        **more: Tensor,
    ) -> None:
        """Add the gradient and the statistics of a part of the batch.

        weight: by which each sample counts
        first, last: whether this is the first, or the last, pass of the step
        more: the numbers of `draw_numbers`, further tensors for the model as `extra_NAME`, and `weights` (`filled_up`)
        """
        weights = more.pop("weights", None)
        if first:
            self.gradients.begin()
            self._statistics.zero_()
        self.gradients.expect(last=last)
        extra = {name.removeprefix("extra_"): more.pop(name) for name in list(more) if name.startswith("extra_")}
        numbers = more or self.draw_numbers(positions)
        u, noise, label, keep = self.draw_noise(positions, images.shape[1:], labels, numbers)
        images = self.numerics.order(images)
        share: float | Tensor = weight / self.experiment.train.global_batch
        if self.scale is not None:
            share = (self.scale.value * share).float()
        with self._low.in_place() if self._low else nullcontext():
            with self._turn():
                with self.numerics.autocast(self.world.device, self.sharded):
                    terms = training_loss(
                        self.diffusion, self.model, images, u=u, noise=noise, label=label, self_cond_keep=keep, **extra
                    )
                ((terms.loss if weights is None else terms.loss * weights).sum() * share).backward()
            self.gradients.collect()
        with torch.no_grad():
            values = terms.loss.detach().double()
            values = values * weight if weight != 1 else values
            each = torch.full_like(values, weight)
            if weights is not None:
                values, each = values * weights, each * weights
            self._statistics[LOSS_SUM].add_(values.sum())
            losses, counts = self._statistics[BY_QUARTILE].view(2, QUARTILES)
            losses.index_add_(0, numbers["quartile"], values)
            counts.index_add_(0, numbers["quartile"], each)

    @torch.no_grad()
    def _finish(self, sent: Tensor) -> None:
        """Sum over the workers, clip, and update weights and averages unless something is not finite.

        sent: float64 (SHARES + averages,), the host's numbers for this step
        """
        values, clip = self._statistics, self.experiment.optim.clip_grad_norm
        values[CLOCK : STOP + 1] = sent[TIME : REQUEST + 1]
        self.world.sum(values[:SUMMED])
        norm, factor = self.gradients.finish().double(), None
        if self.scale is not None:
            values[LOSS_SCALE] = factor = self.scale.value
            norm = norm / factor
        values[GRAD_NORM] = norm
        finite = values[MUST_BE_FINITE].isfinite().all()
        if clip is not None:
            excess = (norm / clip).clamp(min=1)
            factor = excess if factor is None else factor * excess
        if factor is not None:
            self.gradients.scale(factor.reciprocal().float())
        self.update.step(sent[RATE], finite)
        self.ema.update(sent[SHARES:].float())
        if self.scale is not None:
            self.scale.update(finite, values[LOSS_SUM].isfinite())

    def draw_numbers(self, positions: Tensor) -> dict[str, Tensor]:
        """Draw the numbers of each sample, as a function of (seed, position) alone.

        They are equal on every device. The loader draws those of many batches at once.

        u: place of the noise level in its distribution, float32 (b,) in (0, 1)
        quartile: of the noise level, int64 (b,); it is that of u, as logsnr falls with it
        dropped: whether the label is dropped, bool (b,), if the model has labels
        keep: whether the carried state is kept, bool (b,), if the model carries one

        positions: int64 (b,), places of the samples in the run's sequence
        """
        d, train = self.experiment.diffusion, self.experiment.train
        if d.stratified:
            u = stratified_uniform(train.seed, positions, train.global_batch)
        else:
            u = uniform(train.seed, Stream.TIME, positions)
        numbers = {"u": u, "quartile": (u * QUARTILES).long().clamp(max=QUARTILES - 1)}
        if self.num_classes:
            numbers["dropped"] = uniform(train.seed, Stream.LABEL_DROP, positions) < d.label_drop
        if getattr(self.model, "carries_state", False):
            numbers["keep"] = uniform(train.seed, Stream.SELF_COND, positions) < d.self_condition
        return numbers

    def draw_noise(
        self, positions: Tensor, shape: tuple[int, ...], labels: Tensor, numbers: Tensors | None = None
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """Draw what is random in the loss: `u`, the noise (b, *shape), the labels (b,) or None, `keep` or None.

        positions: int64 (b,), places of the samples in the run's sequence
        shape: (C, H, W)
        labels: int64 (b,)
        numbers: of `draw_numbers`, drawn here if there are none
        """
        numbers = numbers or self.draw_numbers(positions)
        label = torch.where(numbers["dropped"], self.num_classes, labels) if "dropped" in numbers else None
        channels_last, seed = self.numerics.channels_last, self.experiment.train.seed
        noise = draw_normal(seed, Stream.NOISE, positions, tuple(shape), channels_last=channels_last)
        return numbers["u"], noise, label, numbers.get("keep")

    # ---- state, for checkpoints

    def _gigabytes(self) -> int:
        """Return the size of a checkpoint, rounded up: weights, two moments, and averages, in float32."""
        copies = 3 + len(self.ema.averages)
        return -(-4 * copies * sum(p.numel() for p in self.model.parameters()) // 10**9)

    def scalars(self) -> dict[str, Any]:
        """Return the part of the state that state.json holds."""
        scale = {"value": float(self.scale.value), "good": int(self.scale.good)} if self.scale else None
        return {"images_seen": self.images_seen, "loss_scale": scale}

    def load_scalars(self, scalars: dict[str, Any]) -> None:
        """Restore what `scalars` returned."""
        self.images_seen = int(scalars["images_seen"])
        if self.scale and scalars.get("loss_scale"):
            self.scale = LossScale(self.world.device, **scalars["loss_scale"])


def filled_up(part: Mapping[str, Tensor], size: int, weight: float) -> dict[str, Tensor]:
    """Repeat the last sample until a pass has `size` of them, and add `weights` (size,): 0 for those that were added.

    part: tensors with one row per sample, (n, ...) with 1 ≤ n ≤ size
    weight: of the samples that are there
    """
    n, device = len(part["positions"]), part["positions"].device
    place = torch.arange(size, device=device)
    rows = place.clamp(max=n - 1)
    return {name: tensor[rows] for name, tensor in part.items()} | {"weights": (place < n) * weight}


def to_device(numbers: list[float], device: torch.device) -> Tensor:
    """Send numbers to a device, as float64, without waiting for it."""
    host = torch.tensor(numbers, dtype=torch.float64, pin_memory=device.type == "cuda")
    return host.to(device, non_blocking=True)


def seed_dropout(device: torch.device, seed: int) -> None:
    """Seed the generator that dropout draws from on a device."""
    generator = torch.default_generator
    if device.type == "cuda":
        generator = torch.cuda.default_generators[torch.cuda.current_device() if device.index is None else device.index]
    generator.manual_seed(seed)


def _generator_seed(seed: int, position: int) -> int:
    """Mix two numbers into a seed for torch's generator."""
    return splitmix64((seed * GOLDEN + position) & MASK) >> 1
