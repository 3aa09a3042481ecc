"""Folds batch normalisation into the convolution before it: the same function with fewer passes over memory."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval


@torch.no_grad()
def fold_batch_norms(model: nn.Module, example: Tensor) -> nn.Module:
    """Remove, in place, each BatchNorm whose input is a convolution's output; return the model.

    One forward pass of `example` shows which convolution feeds which norm, so any architecture works. timm's norms
    that contain an activation keep the activation. A convolution whose output has another reader, or that is used
    twice, keeps its norm.

    model: in evaluation mode.
    """
    producers: dict[int, nn.Conv2d] = {}
    alive: list[Tensor] = []  # keeps ids of tensors unique during the pass
    calls: dict[nn.Conv2d, int] = {}
    pairs: list[tuple[nn.Conv2d, nn.BatchNorm2d]] = []

    def after_conv(module: nn.Module, args: tuple, out: Tensor) -> None:
        assert isinstance(module, nn.Conv2d)
        producers[id(out)] = module
        calls[module] = calls.get(module, 0) + 1
        alive.append(out)

    def before_norm(module: nn.Module, args: tuple) -> None:
        conv = producers.get(id(args[0]))
        if conv is not None and isinstance(module, nn.BatchNorm2d):
            pairs.append((conv, module))

    hooks = []
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            hooks.append(module.register_forward_hook(after_conv))
        elif isinstance(module, nn.BatchNorm2d):
            hooks.append(module.register_forward_pre_hook(before_norm))
    model(example)
    for hook in hooks:
        hook.remove()

    names = {module: name for name, module in model.named_modules()}
    for conv, norm in pairs:
        if calls[conv] != 1:
            continue
        fused = fuse_conv_bn_eval(conv, norm)
        conv.weight, conv.bias = fused.weight, fused.bias
        activation = getattr(norm, "act", None)
        parent, _, name = names[norm].rpartition(".")
        setattr(model.get_submodule(parent), name, activation if activation is not None else nn.Identity())
    return model
