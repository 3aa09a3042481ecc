"""When a run ends, is evaluated and is checkpointed, and at what learning rate it is: functions of images seen."""

from __future__ import annotations

import math
from dataclasses import dataclass

from diffscale.config.experiment import Experiment, OptimSettings

CHECKPOINT_SECONDS = 600.0  # between checkpoints, where the settings name no number of images
EVERY_STEPS = 50  # between log lines, where the settings name no number of images


@dataclass(frozen=True)
class Plan:
    """The clock's marks of one run; images are multiples of the global batch.

    end: images at which the run ends, None where only device-seconds end it. points: images of the evaluations.
    seconds_points: the same in device-seconds, for a run that device-seconds end.
    """

    global_batch: int
    end: int | None
    points: tuple[int, ...]
    device_seconds: float | None
    seconds_points: tuple[float, ...]
    checkpoint_images: int | None
    log_images: int

    def finished(self, images_seen: int, device_seconds: float) -> bool:
        return (self.end is not None and images_seen >= self.end) or (
            self.device_seconds is not None and device_seconds >= self.device_seconds
        )

    def evaluates(self, images: int, before: float, after: float, ended: bool) -> bool:
        """Whether to evaluate after the step that ended at `images`, during which device-seconds went from `before`
        to `after`. A run that is ended by its device-seconds is evaluated there if a share of 1 was asked for."""
        if images in self.points:
            return True
        if ended and self.device_seconds is not None and self.device_seconds in self.seconds_points:
            return True
        return any(before < mark <= after for mark in self.seconds_points)

    def checkpoints(self, images: int, seconds_since_last: float) -> bool:
        if self.checkpoint_images is not None:
            return images % self.checkpoint_images < self.global_batch
        return seconds_since_last >= CHECKPOINT_SECONDS


def make_plan(experiment: Experiment, flops_per_image: float) -> Plan:
    """Budgets and shares of them as images, each rounded up to a whole global batch."""
    train, settings = experiment.train, experiment.eval
    batch = train.global_batch
    ends = [float(train.images)] if train.images is not None else []
    if train.flops is not None:
        ends.append(train.flops / flops_per_image)
    end = whole_batches(min(ends), batch) if ends else None
    images: set[int] = set()
    seconds: tuple[float, ...] = ()
    if settings.n_generated:
        images = {whole_batches(flops / flops_per_image, batch) for flops in settings.points_flops}
        if end is not None:
            images |= {whole_batches(share * min(ends), batch) for share in settings.points}
            images = {point for point in images if point <= end}
        if train.device_seconds is not None and end is None:
            seconds = tuple(share * train.device_seconds for share in sorted(settings.points))
    log_images = train.log_every_images or EVERY_STEPS * batch
    return Plan(
        global_batch=batch,
        end=end,
        points=tuple(sorted(images)),
        device_seconds=train.device_seconds,
        seconds_points=seconds,
        checkpoint_images=train.checkpoint.every_images,
        log_images=log_images,
    )


def whole_batches(images: float, global_batch: int) -> int:
    """`images` rounded up to a multiple of the batch, at least one; a rounding error of 1e-9 does not make one more."""
    return max(1, math.ceil(images / global_batch * (1 - 1e-9))) * global_batch


def learning_rate(optim: OptimSettings, images_seen: int, global_batch: int, end: int | None) -> float:
    """Rate of the step that takes `images_seen` on by a global batch, evaluated at the step's middle.

    constant; inverse_sqrt: lr / √max(t / reference_images, 1) (Karras et al. 2023, eq. 67); cosine:
    lr · ½(1 + cos(π · cosine_rate · progress)) with progress counted from the end of the warm-up (Jabri et al. 2022 run
    .7 to .8 of the half wave). Each times a linear warm-up from zero, and a linear decay to zero over the last
    decay_images. `end`: images of the whole run, needed by cosine and decay.
    """
    t = images_seen + global_batch / 2
    rate = optim.lr
    if optim.schedule == "inverse_sqrt":
        rate /= math.sqrt(max(t / optim.reference_images, 1))
    elif optim.schedule == "cosine":
        assert end is not None
        progress = (t - optim.warmup_images) / max(end - optim.warmup_images, 1)
        rate *= 0.5 * (1 + math.cos(math.pi * optim.cosine_rate * min(max(progress, 0), 1)))
    if optim.warmup_images:
        rate *= min(t / optim.warmup_images, 1)
    if optim.decay_images:
        assert end is not None
        rate *= min(max((end - t) / optim.decay_images, 0), 1)
    return rate
