"""When a run ends, is evaluated and is checkpointed, and its learning rate: functions of images seen."""

from __future__ import annotations

import math
from dataclasses import dataclass

from diffscale.config.experiment import Experiment, OptimSettings

CHECKPOINT_SECONDS = 600.0  # between checkpoints, where the settings name no number of images
EVERY_STEPS = 50  # between log lines, where the settings name no number of images


@dataclass(frozen=True)
class Plan:
    """The budget, evaluations and checkpoints of one run. Images are multiples of the global batch."""

    global_batch: int
    end: int | None  # images at which the run ends; None if only device-seconds end it
    points: tuple[int, ...]  # images of the evaluations
    device_seconds: float | None  # at which the run ends
    seconds_points: tuple[float, ...]  # device-seconds of the evaluations of a run that device-seconds end
    checkpoint_images: int | None  # images between checkpoints; None for CHECKPOINT_SECONDS
    log_images: int  # images between rows of the history

    def finished(self, images_seen: int, device_seconds: float) -> bool:
        """Return whether the budget is used."""
        return (self.end is not None and images_seen >= self.end) or (
            self.device_seconds is not None and device_seconds >= self.device_seconds
        )

    def evaluates(self, images: int, before: float, after: float, ended: bool) -> bool:
        """Return whether to evaluate after the step that ended at `images`.

        A run that its device-seconds end is evaluated at the end if eval.points has a share of 1.

        before, after: device-seconds at the step's beginning and end
        ended: whether the budget is used
        """
        if images in self.points:
            return True
        if ended and self.device_seconds is not None and self.device_seconds in self.seconds_points:
            return True
        return any(before < mark <= after for mark in self.seconds_points)

    def checkpoints(self, images: int, seconds_since_last: float) -> bool:
        """Return whether to save a checkpoint after the step that ended at `images`."""
        if self.checkpoint_images is not None:
            return images % self.checkpoint_images < self.global_batch
        return seconds_since_last >= CHECKPOINT_SECONDS


def make_plan(experiment: Experiment, flops_per_image: float) -> Plan:
    """Turn the budgets and the evaluation points into images, each rounded up to a multiple of the global batch."""
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
    """Round `images` up to a positive multiple of the batch. A relative excess of 1e-9 is a rounding error."""
    return max(1, math.ceil(images / global_batch * (1 - 1e-9))) * global_batch


def learning_rate(optim: OptimSettings, images_seen: int, global_batch: int, end: int | None) -> float:
    """Return the learning rate of the step that begins at `images_seen`, evaluated at the step's middle.

    constant; inverse_sqrt: lr / √max(t / reference_images, 1) (Karras et al. 2023, eq. 67); cosine:
    lr · ½(1 + cos(π · cosine_rate · progress)) with progress counted from the end of the warm-up (Jabri et al. 2022 run
    0.7 to 0.8 of the half wave). Each times a linear warm-up from zero, and a linear decay to zero over the last
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
