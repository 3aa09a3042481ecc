"""How a run computes: precision, memory format, compilation. Chosen once per run, stored, and reused on resume.

"auto" for the memory format is measured on the real model and batch. "auto" for torch.compile weighs what it costs
against what it saves: on a CPU compiling a small UNet took two minutes for less than a tenth of a step, so it is off
there; on a GPU it is on where the run is long enough to earn it back.
"""

from __future__ import annotations

import dataclasses
import logging
import statistics
import time
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

log = logging.getLogger(__name__)

_COMPILE_SECONDS = 150.0  # what compiling a large UNet, forward and backward, takes on an H100's host
_COMPILE_SAVES = 0.2  # of an eager step on a GPU, at least


class Requested(Protocol):
    """What a run's settings ask for: `experiment.train` has these fields."""

    @property
    def precision(self) -> Literal["bf16", "fp16", "tf32", "fp32"]: ...
    @property
    def channels_last(self) -> bool | Literal["auto"]: ...
    @property
    def compile(self) -> bool | Literal["auto"]: ...


@dataclasses.dataclass(frozen=True)
class Numerics:
    """The choices of one run; `dataclasses.asdict` gives what is stored, `Numerics(**stored)` gives it back."""

    precision: Literal["bf16", "fp16", "tf32", "fp32"] = "fp32"  # of matrix products; weights stay float32
    channels_last: bool = False  # memory order of images and convolution weights
    compile: bool = False  # torch.compile of the model

    def autocast(self, device: torch.device | str) -> AbstractContextManager[Any]:
        """The context that a forward pass runs in."""
        if self.precision in ("fp32", "tf32"):
            return nullcontext()
        low = torch.bfloat16 if self.precision == "bf16" else torch.float16
        return torch.autocast(torch.device(device).type, dtype=low)

    def prepare(self, model: nn.Module) -> nn.Module:
        """The model in this memory format (in place) and compiled in place if asked for; the same object."""
        set_memory_format(model, self.channels_last)
        if self.compile:
            model.compile()
        return model

    def order(self, images: Tensor) -> Tensor:
        """(B, C, H, W) in the chosen memory order."""
        return images.contiguous(memory_format=torch.channels_last) if self.channels_last else images.contiguous()


def set_memory_format(model: nn.Module, channels_last: bool) -> None:
    """Put the convolution weights of a model in that order, in place."""
    model.to(memory_format=torch.channels_last if channels_last else torch.contiguous_format)


def choose_numerics(
    model: nn.Module,
    example_batch: Tensor,
    device: torch.device | str,
    requested: Requested,
    steps: int | None = None,
) -> Numerics:
    """Settle what `requested` leaves to "auto".

    model: on `device`, not yet compiled or wrapped; its weights, gradients and random state are left as they were.
    example_batch: images (B, C, H, W) of the micro-batch's shape. steps: how many micro-batches the run still has,
    for the question whether compiling pays; None: many. In a group of workers rank 0 chooses and the others are told.
    """
    device = torch.device(device)
    channels_last = requested.channels_last
    seconds: dict[bool, float] = {}
    if channels_last == "auto":
        if any(isinstance(module, nn.Conv2d) for module in model.modules()):
            for candidate in (False, True):
                numerics = Numerics(requested.precision, channels_last=candidate)
                seconds[candidate] = _step_seconds(model, example_batch, device, numerics)
        channels_last = seconds[True] < seconds[False] if seconds else False
        log.info("channels_last=%s, seconds per step %s", channels_last, seconds)
    compiled = requested.compile
    if compiled == "auto":
        compiled = False
        if device.type == "cuda":
            eager = seconds.get(channels_last) or _step_seconds(
                model, example_batch, device, Numerics(requested.precision, channels_last)
            )
            compiled = steps is None or steps * eager * _COMPILE_SAVES > _COMPILE_SECONDS
            log.info("compile=%s: %s steps of %.3f s", compiled, steps, eager)
    return Numerics(requested.precision, channels_last=bool(channels_last), compile=bool(compiled))


def _step_seconds(model: nn.Module, images: Tensor, device: torch.device, numerics: Numerics) -> float:
    """Median seconds of a forward and backward pass, without any lasting effect on the model or the generators."""
    set_memory_format(model, numerics.channels_last)
    images = numerics.order(images.to(device))
    logsnr = torch.zeros(len(images), device=device)
    kept = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    training, times = model.training, []
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        model.train()
        for _ in range(5):
            model.zero_grad(set_to_none=True)
            _wait(device)
            start = time.perf_counter()
            with numerics.autocast(device):
                prediction, _ = model(images, logsnr)
                loss = F.mse_loss(prediction.float(), torch.zeros_like(prediction, dtype=torch.float32))
            loss.backward()
            _wait(device)
            times.append(time.perf_counter() - start)
    model.train(training)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(kept[name])
            parameter.grad = gradients[name]
    return statistics.median(times[2:])


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
