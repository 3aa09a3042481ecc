from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from diffscale.kernels.attention import attend


def test_zeros_behind_each_head_change_nothing_but_the_scale() -> None:
    """A GPU's fused kernels take widths that 8 divides: heads of 52 are padded to 56, and √52 stays the divisor."""
    q, k, v = torch.randn(3, 2, 4, 9, 52, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    padded = attend(*(F.pad(t, (0, 4)) for t in (q, k, v)), scale=1 / math.sqrt(52))
    torch.testing.assert_close(padded[..., :52], attend(q, k, v))
    assert not padded[..., 52:].any()
