"""Optimizers by timm's names, with weight decay on weight matrices and convolutions alone.

Adam and AdamW are torch's fused ones: their learning rate is a tensor on the device, and so is the flag that makes them
skip a step, so a step does not wait for the host. timm's take numbers of the host and wait for it once per step.

timm's Muon orthogonalises its updates in bf16, as published. A run whose matrix products are float32 has these too in
float32: a processor without bf16 instructions emulates them at a fiftieth of its speed, and Muon was 93 % of a step.
"""

from __future__ import annotations

import inspect
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from diffscale.config.experiment import OptimSettings
from diffscale.core.errors import UserError
from diffscale.core.text import nearest, one_line

# timm makes the same classes for these names; it takes as long to import as torch, and most runs use these.
_KRON = "it keeps lists and its own random generator, which a checkpoint cannot hold"
_REFUSED = {
    "adahessian": "it needs second derivatives, which training does not compute",
    "kron": _KRON,
    "kronc": _KRON,
    "kronw": _KRON,
}
_FROM_TORCH: dict[str, type[torch.optim.Adam]] = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}


def create_optimizer(model: nn.Module, optim: OptimSettings) -> torch.optim.Optimizer:
    """Create timm's optimizer of a name over `parameter_groups`. Raises UserError as `check_optimizer` does."""
    check_optimizer(optim)
    adapts = {"always_adapt": True} if optim.trust_ratio == "always" else {}
    groups = parameter_groups(model, optim.weight_decay, optim.decay_on, **adapts)
    if optim.name in _FROM_TORCH:
        capturable = next(model.parameters()).device.type == "cuda"  # a CUDA graph may record the step
        return _FROM_TORCH[optim.name](
            groups, lr=optim.lr, betas=optim.betas, eps=optim.eps, fused=True, capturable=capturable
        )
    from timm.optim import create_optimizer_v2, get_optimizer_info  # import cost

    info = get_optimizer_info(optim.name)
    extra: dict[str, Any] = {"eps": optim.eps} if info.has_eps else {}
    if info.has_betas and info.num_betas == 2:
        extra["betas"] = optim.betas
    if "max_grad_norm" in _arguments(optim.name):  # optim.clip_grad_norm is the only clipping
        extra["max_grad_norm"] = None
    return create_optimizer_v2(groups, optim.name, lr=optim.lr, weight_decay=optim.weight_decay, **extra)


def try_optimizer(optim: OptimSettings) -> None:
    """Raise UserError for an optimizer that cannot make a step under these settings: it makes one on a few numbers."""
    model = nn.Linear(4, 4)
    model(torch.ones(2, 4)).square().sum().backward()
    try:
        create_optimizer(model, optim).step()
    except UserError:
        raise
    except (ValueError, TypeError, RuntimeError, ArithmeticError) as error:
        raise UserError(
            setting="optim.name",
            value=optim.name,
            expected="an optimizer that these settings of optim fit",
            reason=one_line(error),
        ) from None


class Update:
    """The optimizer's part of a step: a learning rate, and no update where a value was not finite.

    products: dtype of the run's matrix products, and of Muon's
    optimizer: its state is part of each checkpoint
    on_device: whether rate and decision stay on the device, so that the host is not waited for
    """

    def __init__(
        self, model: nn.Module, optim: OptimSettings, device: torch.device, products: torch.dtype = torch.bfloat16
    ) -> None:
        self.optimizer = create_optimizer(model, optim)
        self._muon_in = products if is_muon(optim.name) else None
        groups = self.optimizer.param_groups
        self.on_device = all(group.get("fused") for group in groups)
        if self.on_device:
            # The CPU's kernel computes with the rate in float64, CUDA's reads it in float32.
            dtype = torch.float32 if device.type == "cuda" else torch.float64
            self._rate = torch.zeros((), dtype=dtype, device=device)
            self._skipped = torch.zeros((), device=device)
            self.optimizer.found_inf = self._skipped  # type: ignore[attr-defined]
            for group in groups:
                group["lr"] = self._rate

    @torch.no_grad()
    def step(self, rate: Tensor, finite: Tensor) -> None:
        """Update the weights if `finite`. rate: float64 (), the learning rate; finite: bool ()."""
        if self.on_device:
            self._rate.copy_(rate)
            self._skipped.copy_(finite.logical_not())
        else:
            value, go = torch.stack([rate, finite.double()]).tolist()
            if not go:
                return
            for group in self.optimizer.param_groups:
                group["lr"] = value
        if self._muon_in is None:
            self.optimizer.step()
        else:
            with _newton_schulz_in(self._muon_in):
                self.optimizer.step()


def is_muon(name: str) -> bool:
    """Return whether an optimizer, by timm's name, is Muon or one of its relatives."""
    return name.endswith("muon")


@contextmanager
def _newton_schulz_in(dtype: torch.dtype) -> Iterator[None]:
    """Have timm's Muon orthogonalise in a dtype: its function takes one, its optimizers do not."""
    from timm.optim import muon  # import cost

    original = muon.zeropower_via_newtonschulz
    muon.zeropower_via_newtonschulz = partial(original, dtype=dtype)
    try:
        yield
    finally:
        muon.zeropower_via_newtonschulz = original


def check_optimizer(optim: OptimSettings) -> None:
    """Raise UserError for an optimizer that is unknown or cannot train or resume here, and for a setting of others."""
    _check_name(optim.name)
    if optim.trust_ratio == "always" and "always_adapt" not in _arguments(optim.name):
        raise UserError(
            setting="optim.trust_ratio",
            value=optim.trust_ratio,
            expected="decayed, the default",
            reason=f"{optim.name} has no trust ratio; lamb and lars have one",
        )


def _arguments(name: str) -> Collection[str]:
    """Return the names of the arguments of an optimizer's constructor."""
    if name in _FROM_TORCH:
        return ()
    from timm.optim import get_optimizer_class  # import cost

    return inspect.signature(get_optimizer_class(name, bind_defaults=False)).parameters


def _check_name(name: str) -> None:
    """Raise UserError for an unknown name, and for an optimizer that cannot train or resume here."""
    if name in _FROM_TORCH:
        return
    from timm.optim import list_optimizers  # import cost

    known = [str(n) for n in list_optimizers() if n not in _REFUSED]
    if name in _REFUSED:
        raise UserError(setting="optim.name", value=name, expected="another optimizer", reason=_REFUSED[name])
    if name not in known:
        raise UserError(setting="optim.name", value=name, expected=nearest(name, known))


def parameter_groups(
    model: nn.Module,
    weight_decay: float,
    decay_on: Literal["weights", "matrices", "all"] = "weights",
    **of_decayed: Any,
) -> list[dict[str, Any]]:
    """Return the group with weight decay and the group without, each in the order of `model.named_parameters()`.

    weights: all but vectors and scalars (norms, biases), embedding tables, and what `model.no_weight_decay()` names
    matrices: all but vectors and scalars, as RIN's authors have it (google-research/pix2seq, `bias,beta,gamma`)
    all: every parameter
    of_decayed: further options of the group with weight decay
    """
    exempt: set[str] = set(model.no_weight_decay()) if hasattr(model, "no_weight_decay") else set()  # type: ignore[operator]
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding):
            exempt.add(f"{name}.weight")
    decayed: list[Tensor] = []
    plain: list[Tensor] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            vector = parameter.ndim <= 1 or name.endswith(".bias")
            exempted = decay_on != "all" and (vector or (decay_on == "weights" and name in exempt))
            (plain if exempted else decayed).append(parameter)
    groups = [{"params": decayed, "weight_decay": weight_decay, **of_decayed}, {"params": plain, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]
