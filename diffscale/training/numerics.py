"""How a run computes: precision, memory format, convolution algorithm, compilation.

What the settings leave to "auto" follows from the kind of device, the network and the installed libraries, never from
a timing, so the same command computes the same whatever else the machine is doing.
"""

from __future__ import annotations

import dataclasses
import platform
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from diffscale.kernels import compile as native
from diffscale.kernels import group_norm as norm_act
from diffscale.kernels import winograd
from diffscale.kernels.float32 import allow_tf32
from diffscale.training.sharding import is_sharded

# On a GPU compiling a large network takes some 150 s and saves 20 % of a step, so it pays within a quarter of an hour:
# networks of this size train for longer. On a CPU compiling takes minutes and saves at most 15 %.
_COMPILE_PARAMETERS = 20_000_000

Precision = Literal["bf16", "fp16", "tf32", "fp32"]


class Requested(Protocol):
    """What a run's settings ask for: `experiment.train` has these fields."""

    @property
    def precision(self) -> Precision | Literal["auto"]: ...
    @property
    def channels_last(self) -> bool | Literal["auto"]: ...
    @property
    def compile(self) -> bool | Literal["auto"]: ...
    @property
    def winograd(self) -> bool | Literal["auto"]: ...


@dataclasses.dataclass(frozen=True)
class Numerics:
    """The choices of one run; `dataclasses.asdict` gives what is stored, `Numerics(**stored)` gives it back."""

    precision: Precision = "fp32"  # of matrix products; weights stay float32
    channels_last: bool = False  # memory order of images and convolution weights
    compile: bool = False  # torch.compile of the model
    winograd: bool = False  # 3 × 3 convolutions on a CPU with fewer multiplications (kernels/winograd.py)

    def autocast(self, device: torch.device | str) -> AbstractContextManager[Any]:
        """The context that a forward pass runs in."""
        if self.precision in ("fp32", "tf32"):
            return nullcontext()
        low = torch.bfloat16 if self.precision == "bf16" else torch.float16
        return torch.autocast(torch.device(device).type, dtype=low)

    def prepare(self, model: nn.Module) -> nn.Module:
        """The model set to compute so, and compiled if asked for, in place; the same object.

        Sharded weights stay contiguous, as FSDP2 needs them; the images alone then carry the memory order. TF32 is a
        choice of the whole process: that of the model prepared last.
        """
        allow_tf32(self.precision == "tf32")
        if not any(is_sharded(parameter) for parameter in model.parameters()):
            model.to(memory_format=torch.channels_last if self.channels_last else torch.contiguous_format)
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


def choose_numerics(model: nn.Module, device_type: str, requested: Requested, bf16: bool | None = None) -> Numerics:
    """Replace every "auto" of `requested` by what the rule gives.

    model: of any device, the meta device too; it is not changed.
    device_type: cpu or cuda.
    bf16: whether that device multiplies bf16; None asks this machine.
    """
    if bf16 is None:
        bf16 = multiplies_bf16(device_type)
    precision = requested.precision
    if precision == "auto":
        precision = "bf16" if bf16 else "fp32"
    convolves = any(is_spatial_convolution(module) for module in model.modules())
    use_winograd = requested.winograd
    if use_winograd == "auto":
        layers = any(hasattr(module, "winograd") for module in model.modules())
        open_to_it = requested.channels_last == "auto" and layers
        use_winograd = open_to_it and winograd_available(precision, device_type)
    channels_last = requested.channels_last
    if channels_last == "auto":
        # Channels-last pays on a GPU's tensor cores; on a CPU only where group norm has a kernel for it.
        fast = native.available(norm_act.KERNEL) if device_type == "cpu" else precision != "fp32"
        channels_last = convolves and fast
    compiled = requested.compile
    if compiled == "auto":
        size = sum(parameter.numel() for parameter in model.parameters())
        compiled = device_type == "cuda" and size >= _COMPILE_PARAMETERS
    return Numerics(precision, channels_last, compiled, use_winograd)


def is_spatial_convolution(module: nn.Module) -> bool:
    """Whether a module convolves with overlapping windows; a patch embedding is a linear layer in disguise."""
    if hasattr(module, "winograd"):
        return True
    return isinstance(module, nn.Conv2d) and any(k > s for k, s in zip(module.kernel_size, module.stride, strict=True))


def winograd_available(precision: str, device_type: str) -> bool:
    """Whether this machine can compile and run Winograd's kernels for a precision."""
    kernels = {"fp32": winograd.FLOAT32, "bf16": winograd.BFLOAT16}.get(precision)
    return device_type == "cpu" and kernels is not None and kernels.available


def multiplies_bf16(device_type: str) -> bool:
    """Whether this machine's processor, or its first GPU, has instructions for bf16 products. A processor without them
    emulates bf16 at a fiftieth of its float32 speed."""
    if device_type == "cuda":
        return torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0)
    if platform.machine() in ("aarch64", "arm64"):
        features = Path("/proc/cpuinfo")
        return features.exists() and " bf16" in features.read_text(errors="replace")
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
