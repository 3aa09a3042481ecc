"""How a run computes: precision, memory format, compilation. Chosen once per run, stored, and reused on resume.

"auto" for the precision is bf16 where a matrix product is faster in it: processors without bf16 instructions emulate it
at a fiftieth of their float32 speed. "auto" for the memory format is measured on the real model and batch. "auto" for
torch.compile weighs what it costs against what it saves: it is on where the run is long enough to earn it back. On a
CPU that is several times what it costs, because a run that starts again compiles again; what it saves there beside
Winograd's convolutions are passes over the tokens of a transformer, and nothing for a UNet.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import time
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffscale import native
from diffscale.float32 import allow_tf32
from diffscale.models import norm_act, winograd

log = logging.getLogger(__name__)

_COMPILE_SECONDS = {"cuda": 150.0, "cpu": 450.0}  # of a large UNet on an H100's host; 3 × a small RIN on 2 cores
# Of an eager step, at least; on a CPU 15 % (DiT, RIN) to 28 % (JiT), beside Winograd's convolutions 8 % (UViT) or none.
_COMPILE_SAVES = {"cuda": 0.2, "cpu": 0.15}
_COMPILE_SAVES_WITH_WINOGRAD = 0.05
_ENOUGH_IMAGES = 16  # of a batch, to compare memory formats on a CPU

Precision = Literal["bf16", "fp16", "tf32", "fp32"]


class Requested(Protocol):
    """What a run's settings ask for: `experiment.train` has these fields."""

    @property
    def precision(self) -> Precision | Literal["auto"]: ...
    @property
    def channels_last(self) -> bool | Literal["auto"]: ...
    @property
    def compile(self) -> bool | Literal["auto"]: ...


@dataclasses.dataclass(frozen=True)
class Numerics:
    """The choices of one run; `dataclasses.asdict` gives what is stored, `Numerics(**stored)` gives it back."""

    precision: Precision = "fp32"  # of matrix products; weights stay float32
    channels_last: bool = False  # memory order of images and convolution weights
    compile: bool = False  # torch.compile of the model
    winograd: bool = False  # 3 × 3 convolutions on a CPU with fewer multiplications (models/winograd.py)

    def autocast(self, device: torch.device | str) -> AbstractContextManager[Any]:
        """The context that a forward pass runs in."""
        if self.precision in ("fp32", "tf32"):
            return nullcontext()
        low = torch.bfloat16 if self.precision == "bf16" else torch.float16
        return torch.autocast(torch.device(device).type, dtype=low)

    def prepare(self, model: nn.Module) -> nn.Module:
        """The model set to compute so, and compiled if asked for, in place; the same object. TF32 is a choice of the
        whole process: that of the model prepared last."""
        allow_tf32(self.precision == "tf32")
        set_memory_format(model, self.channels_last)
        winograd.use_winograd(model, self.winograd)
        if self.compile:
            for kernel in self._kernels(next(model.parameters()).device):
                native.available(kernel)  # answered before torch.compile asks
            model.compile()
        return model

    def _kernels(self, device: torch.device) -> list[str]:
        """The C++ sources that a model there may call."""
        if device.type != "cpu":
            return []
        products = winograd.BFLOAT16 if self.precision == "bf16" else winograd.FLOAT32
        return [norm_act.KERNEL, products.name] if self.winograd else [norm_act.KERNEL]

    def order(self, images: Tensor) -> Tensor:
        """(B, C, H, W) in the chosen memory order."""
        return images.contiguous(memory_format=torch.channels_last) if self.channels_last else images.contiguous()


def set_memory_format(model: nn.Module, channels_last: bool) -> None:
    """Put the convolution weights of a model in that order, in place."""
    model.to(memory_format=torch.channels_last if channels_last else torch.contiguous_format)


def settle_precision(requested: Precision | Literal["auto"], device: torch.device | str) -> Precision:
    """What "auto" means on a device: bf16 if a matrix product there is 1.3 times as fast in it as in float32."""
    if requested != "auto":
        return requested
    device = torch.device(device)
    side = 4096 if device.type == "cuda" else 256  # of a product that takes 40 ms where bf16 is emulated
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        a, times = torch.ones(side, side, device=device, dtype=dtype), []
        for _ in range(4):
            _wait(device)
            start = time.perf_counter()
            torch.mm(a, a)
            _wait(device)
            times.append(time.perf_counter() - start)
        seconds[dtype] = min(times[1:])
    log.info("precision=auto, seconds of a matrix product of side %d: %s", side, seconds)
    return "bf16" if 1.3 * seconds[torch.bfloat16] < seconds[torch.float32] else "fp32"


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
    precision = settle_precision(requested.precision, device)
    candidates = _candidates(model, precision, device, requested)
    seconds: dict[Numerics, float] = {}
    images = example_batch if device.type == "cuda" else example_batch[:_ENOUGH_IMAGES]
    if len(candidates) > 1:
        for candidate in candidates:
            fastest = min(seconds.values(), default=math.inf)
            seconds[candidate] = _step_seconds(model, images, device, candidate, fastest)
        log.info("seconds per step: %s", seconds)
    chosen = min(candidates, key=lambda candidate: seconds.get(candidate, 0.0))
    compiled = requested.compile
    if compiled == "auto":
        compiled, saves = False, _COMPILE_SAVES.get(device.type, 0.0)
        if device.type == "cpu" and not winograd.FLOAT32.available:  # which needs the same compiler
            saves = 0.0
        elif chosen.winograd:
            saves = _COMPILE_SAVES_WITH_WINOGRAD if _mostly_linear(model) else 0.0
        if saves:
            eager = seconds.get(chosen) or _step_seconds(model, images, device, chosen)
            eager *= len(example_batch) / len(images)
            saved = math.inf if steps is None else steps * eager * saves
            compiled = saved > _COMPILE_SECONDS[device.type]
            log.info("compile=%s: %s steps of %.3f s", compiled, steps, eager)
    return dataclasses.replace(chosen, compile=bool(compiled))


def _mostly_linear(model: nn.Module) -> bool:
    """Whether most weights are those of linear layers."""
    linear = sum(module.weight.numel() for module in model.modules() if isinstance(module, nn.Linear))
    return 2 * linear > sum(parameter.numel() for parameter in model.parameters())


def _candidates(model: nn.Module, precision: Precision, device: torch.device, requested: Requested) -> list[Numerics]:
    """What to choose from, the likeliest first: memory formats and convolution algorithms, which matter to
    convolutions alone."""
    if requested.channels_last != "auto":
        return [Numerics(precision, requested.channels_last)]
    found = [Numerics(precision)]
    has_winograd = winograd.use_winograd(model, False)
    if has_winograd or any(isinstance(module, nn.Conv2d) for module in model.modules()):
        found.insert(0, Numerics(precision, channels_last=True))
    kernels = {"fp32": winograd.FLOAT32, "bf16": winograd.BFLOAT16}.get(precision)
    if has_winograd and device.type == "cpu" and kernels is not None and kernels.available:
        found.insert(0, Numerics(precision, channels_last=True, winograd=True))
    return found


def _step_seconds(
    model: nn.Module, images: Tensor, device: torch.device, numerics: Numerics, fastest: float = math.inf
) -> float:
    """Least seconds of a forward and backward pass, without any lasting effect on the model or the generators.

    fastest: of others; one that needs a quarter more the first time is not looked at again.
    """
    dataclasses.replace(numerics, compile=False).prepare(model)
    images = numerics.order(images.to(device))
    logsnr = torch.zeros(len(images), device=device)
    kept = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    training, times = model.training, list[float]()
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        model.train()
        while len(times) < 4 and min(times[1:], default=0.0) < 1.25 * fastest:
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
    return min(times[1:])


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
