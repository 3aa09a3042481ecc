"""Winograd's algorithm in networks that others wrote: Inception's 3 × 3 convolutions in half the time on a CPU."""

from __future__ import annotations

from torch import Tensor, nn

from diffscale.kernels.winograd import FLOAT32, convolve, shift_of, suitable, transform_filters


class FastConv(nn.Module):
    """A 3 × 3 convolution of stride 1 and padding 0 or 1 whose weights stay as they are; float32 on a CPU, where the
    kernels take it, and else as it was."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.conv = conv
        self._filters = transform_filters(conv.weight, FLOAT32)

    def forward(self, x: Tensor) -> Tensor:
        if suitable(x, self.conv.weight) is not FLOAT32:
            return self.conv(x)
        y = convolve(x, self._filters, shift_of(x, self.conv.bias, None))
        return y if self.conv.padding == (1, 1) else y[:, :, 1:-1, 1:-1]


def use_fast_convolutions(model: nn.Module) -> None:
    """Replaces the convolutions of a network for inference that FastConv can stand for, where it can run."""
    for name, conv in [*model.named_modules()]:
        if isinstance(conv, nn.Conv2d) and _stands_for(conv) and FLOAT32.available:
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, FastConv(conv))


def _stands_for(conv: nn.Conv2d) -> bool:
    return (
        conv.kernel_size == (3, 3)
        and (conv.stride, conv.dilation, conv.groups) == ((1, 1), (1, 1), 1)
        and conv.padding in ((0, 0), (1, 1))
        and conv.padding_mode == "zeros"
        and conv.in_channels % FLOAT32.lanes == conv.out_channels % FLOAT32.lanes == 0
    )
