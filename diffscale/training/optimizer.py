"""Optimizers by timm's names, with weight decay only where it belongs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from diffscale.config.experiment import OptimSettings
from diffscale.core.errors import UserError
from diffscale.core.text import nearest
from diffscale.training.sharding import is_sharded

# What timm makes for these names as well: timm takes as long to import as torch, and these are what most runs use.
_KRON = "keeps lists and a random generator of its own, which a checkpoint cannot hold"
_REFUSED = {
    "adahessian": "needs second derivatives, which training does not compute",
    "kron": _KRON,
    "kronc": _KRON,
    "kronw": _KRON,
}
_FROM_TORCH: dict[str, type[torch.optim.Adam]] = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}


def create_optimizer(model: nn.Module, optim: OptimSettings) -> torch.optim.Optimizer:
    """timm's optimizer of that name over `parameter_groups`. Raises UserError for an unknown name."""
    check_name(optim.name)
    groups = parameter_groups(model, optim.weight_decay)
    if optim.name in _FROM_TORCH:
        fused = None if any(is_sharded(p) for p in model.parameters()) else True
        return _FROM_TORCH[optim.name](groups, lr=optim.lr, betas=optim.betas, eps=optim.eps, fused=fused)
    from timm.optim import create_optimizer_v2, get_optimizer_info

    info = get_optimizer_info(optim.name)
    extra: dict[str, Any] = {"eps": optim.eps} if info.has_eps else {}
    if info.has_betas and info.num_betas == 2:
        extra["betas"] = optim.betas
    return create_optimizer_v2(groups, optim.name, lr=optim.lr, weight_decay=optim.weight_decay, **extra)


def check_name(name: str) -> None:
    """Raises UserError with the nearest of timm's names, or for one that cannot train or resume here."""
    if name in _FROM_TORCH:
        return
    from timm.optim import list_optimizers

    known = [str(n) for n in list_optimizers() if n not in _REFUSED]
    if name in _REFUSED:
        raise UserError(setting="optim.name", value=name, expected=f"another optimizer: it {_REFUSED[name]}")
    if name not in known:
        raise UserError(setting="optim.name", value=name, expected=nearest(name, known))


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two groups, in the order of `model.named_parameters()`: decayed, and not: vectors and scalars (norms, biases),
    embedding tables, and what `model.no_weight_decay()` names."""
    exempt: set[str] = set(model.no_weight_decay()) if hasattr(model, "no_weight_decay") else set()  # type: ignore[operator]
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding):
            exempt.add(f"{name}.weight")
    decayed: list[Tensor] = []
    plain: list[Tensor] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            exempted = parameter.ndim <= 1 or name.endswith(".bias") or name in exempt
            (plain if exempted else decayed).append(parameter)
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]
