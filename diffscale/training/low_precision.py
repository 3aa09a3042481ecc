"""Copies in bf16 or fp16 of the weights that a network computes with in it, made together.

torch.autocast casts each weight by itself, and each gradient back: two kernels for each of some hundred parameters, a
third of a small network's step. Here one kernel casts all of them before a pass, and one moves all gradients back. The
values are the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from diffscale.models.layers import GroupNorm
from diffscale.training.numerics import Numerics
from diffscale.training.parallel import FlatGradients

# Modules that use their parameters in the dtype of the computation alone.
_CASTING = (nn.Linear, nn.Conv2d, GroupNorm)
_LOW = {"bf16": torch.bfloat16, "fp16": torch.float16}


class LowPrecisionWeights:
    """The copies of one model, in place of its parameters while `in_place` is active.

    The first pass watches where the model computes in low precision; later passes use the copies.
    """

    def __init__(self, model: nn.Module, numerics: Numerics, gradients: FlatGradients) -> None:
        """Find the modules to watch. gradients: those of the model, which take the copies' gradients."""
        self.dtype, self.gradients = _LOW[numerics.precision], gradients
        self._modules = [module for module in model.modules() if type(module) in _CASTING]
        others = [module for module in model.modules() if type(module) not in _CASTING]
        self._excluded = {id(p) for module in others for p in module.parameters(recurse=False)}
        self._low: dict[int, bool] = {}  # by module: whether all its calls were in low precision
        self._places: list[tuple[nn.Module, str, nn.Parameter, nn.Parameter]] | None = None
        self._full: list[Tensor] = []
        self._copies: list[Tensor] = []

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Context of the forward and backward computation of a pass."""
        if self._places is None:
            handles = [module.register_forward_pre_hook(self._watch) for module in self._modules]
            try:
                yield
            finally:
                for handle in handles:
                    handle.remove()
            self._make_copies()
            return
        if self._copies:
            with torch.no_grad():
                torch._foreach_copy_(self._copies, self._full)
        for module, name, _, copy in self._places:
            module._parameters[name] = copy
        try:
            yield
        finally:
            for module, name, parameter, _ in self._places:
                module._parameters[name] = parameter

    def _watch(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        x = inputs[0]
        low = x.dtype == self.dtype if isinstance(module, GroupNorm) else torch.is_autocast_enabled(x.device.type)
        self._low[id(module)] = low and self._low.get(id(module), True)

    def _make_copies(self) -> None:
        """Copy the parameters that modules in low precision alone have."""
        holders = [(m, name, p) for m in self._modules for name, p in m._parameters.items() if p is not None]
        excluded = self._excluded | {id(p) for m, _, p in holders if not self._low.get(id(m), False)}
        copies: dict[nn.Parameter, nn.Parameter] = {}
        self._places = []
        for module, name, parameter in holders:
            if id(parameter) in excluded or not parameter.requires_grad:
                continue
            if parameter not in copies:
                copies[parameter] = nn.Parameter(parameter.detach().to(self.dtype))
            self._places.append((module, name, parameter, copies[parameter]))
        self._full = [parameter.detach() for parameter in copies]
        self._copies = list(copies.values())
        self.gradients.read_from(copies)


def keeps_copies(numerics: Numerics, device: torch.device) -> bool:
    """Return whether the copies pay: not on a CPU, where a cast costs what it moves, and not in compiled networks."""
    return numerics.precision in _LOW and device.type == "cuda" and not numerics.compile
