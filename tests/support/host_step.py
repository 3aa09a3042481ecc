"""The training step as it was when the host decided: the reference for the one that decides on the device.

Written out for one worker, as of commit 9919b70: the gradients in one buffer, the norm read by the host, the learning
rate, the clipping factor and the averages' weights as numbers of the host.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from diffscale.config.experiment import Experiment
from diffscale.core.hashing import GOLDEN, MASK, splitmix64
from diffscale.core.keyed_random import Stream, normal, stratified_uniform, uniform
from diffscale.diffusion import Diffusion, training_loss
from diffscale.training.ema import exponent, halflife_beta, power_beta, profile_name
from diffscale.training.numerics import Numerics
from diffscale.training.optimizer import create_optimizer
from diffscale.training.parallel import passes
from diffscale.training.plan import learning_rate


class HostLearner:
    """One worker's weights, optimizer and averages, and a step that waits for each of its numbers."""

    def __init__(
        self, model: nn.Module, diffusion: Diffusion, experiment: Experiment, numerics: Numerics, num_classes: int
    ) -> None:
        self.model, self.diffusion, self.experiment = model, diffusion, experiment
        self.numerics, self.num_classes = numerics, num_classes
        self.images_seen = 0
        self.optimizer = create_optimizer(model, experiment.optim)
        self.parameters = [p for p in model.parameters() if p.requires_grad][::-1]
        self.flat = torch.zeros(sum(p.numel() for p in self.parameters))
        self.averages: dict[str, list[Tensor]] = {
            name: [p.detach().float().clone() for p in model.parameters()]
            for name in ["halflife", *(profile_name(std) for std in experiment.train.ema.power)]
        }
        self.exponents = {profile_name(std): exponent(std) for std in experiment.train.ema.power}

    def step(self, batch: Any) -> tuple[float, float, bool]:
        """Make one update; return the loss, the gradient's norm, and whether it was skipped."""
        train, optim = self.experiment.train, self.experiment.optim
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(optim, self.images_seen, train.global_batch, None)
        self.model.train()
        self._zero()
        loss_sum = torch.zeros((), dtype=torch.float64)
        size = train.micro_batch or train.global_batch
        for i in range(passes(train.global_batch, 1, train.micro_batch)):
            loss_sum += self._pass(batch, slice(i * size, min((i + 1) * size, train.global_batch)))
        loss, grad_norm, factor = float(loss_sum), float(torch.linalg.vector_norm(self.flat)), 1.0
        finite = math.isfinite(loss) and math.isfinite(grad_norm)
        if finite:
            if optim.clip_grad_norm is not None and grad_norm > optim.clip_grad_norm:
                factor *= grad_norm / optim.clip_grad_norm
            if factor != 1:
                self.flat.mul_(1 / factor)
            self.optimizer.step()
        self.images_seen += train.global_batch
        self._average()
        return loss / train.global_batch, grad_norm, not finite

    def _zero(self) -> None:
        self.flat.zero_()
        start = 0
        for p in self.parameters:
            part = self.flat[start : start + p.numel()]
            dense = p.is_contiguous() or p.is_contiguous(memory_format=torch.channels_last)
            p.grad = part.as_strided(p.shape, p.stride()) if dense and p.ndim == 4 else part.view(p.shape)
            start += p.numel()

    def _pass(self, batch: Any, part: slice) -> Tensor:
        d, train = self.experiment.diffusion, self.experiment.train
        positions, labels = batch.positions[part], batch.labels[part]
        images = self.numerics.order(batch.images[part])
        if d.stratified:
            u = stratified_uniform(train.seed, positions, train.global_batch)
        else:
            u = uniform(train.seed, Stream.TIME, positions)
        noise = self.numerics.order(normal(train.seed, Stream.NOISE, positions, tuple(images.shape[1:])))
        label = keep = None
        if self.num_classes:
            dropped = uniform(train.seed, Stream.LABEL_DROP, positions) < d.label_drop
            label = torch.where(dropped, torch.full_like(labels, self.num_classes), labels)
        if getattr(self.model, "carries_state", False):
            keep = uniform(train.seed, Stream.SELF_COND, positions) < d.self_condition
        torch.manual_seed(splitmix64((train.seed * GOLDEN + int(positions[0])) & MASK) >> 1)
        with self.numerics.autocast("cpu"):
            terms = training_loss(
                self.diffusion, self.model, images, u=u, noise=noise, label=label, self_cond_keep=keep
            )
        loss = terms.loss.sum() * 1.0
        (loss * (1.0 / train.global_batch)).backward()
        return terms.loss.detach().double().sum()

    @torch.no_grad()
    def _average(self) -> None:
        images = self.experiment.train.global_batch
        for name, average in self.averages.items():
            if name == "halflife":
                beta = halflife_beta(self.experiment.train.ema, self.images_seen, images)
            else:
                beta = power_beta(self.exponents[name], self.images_seen, images)
            torch._foreach_lerp_(average, [p.detach().float() for p in self.model.parameters()], 1 - beta)
