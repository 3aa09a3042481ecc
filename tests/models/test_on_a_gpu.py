"""What a GPU would compute with, read from shapes alone: no GPU is needed.

Fake tensors have a device, a dtype and strides but no values, so a training pass of any preset costs a moment.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from diffscale.models import PRESETS, create_model
from diffscale.models.cost import make_fake

FAST = {"unet-tiny", "unet-cifar10", "edm2-tiny", "uvit-tiny", "rin-tiny", "dit-mini", "jit-mini", "hdit-tiny"}
HEADS_OF_52 = {
    "dit-tiny",
    "jit-tiny",
}  # measured by published records, so they stay; dit-mini and jit-mini replace them
EVERY = [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in PRESETS]

# Operations with no deterministic kernel on CUDA (torch.use_deterministic_algorithms, torch 2.15) that a network could
# call in training, by the names that PyTorch dispatches.
NOT_DETERMINISTIC = {
    "adaptive_avg_pool2d_backward",
    "avg_pool3d_backward",
    "cumsum",
    "grid_sampler_2d_backward",
    "histc",
    "max_pool2d_with_indices_backward",
    "median",
    "put_",
    "reflection_pad2d_backward",
    "replication_pad2d_backward",
    "scatter_reduce",
    "upsample_bicubic2d_backward",
    "upsample_bilinear2d_backward",
}


class Operations(TorchDispatchMode):
    """Records every operation with its tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, Any, list[Tensor], list[Tensor]]] = []
        self.flops = {True: 0, False: 0}  # of matrix products, by whether their inputs are float32

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given, made = ([t for t in tree_leaves(x) if isinstance(t, Tensor)] for x in ((args, kwargs), out))
        self.seen.append((func._schema.name.removeprefix("aten::"), func, given, made))
        if func._overloadpacket in flop_registry:
            count = flop_registry[func._overloadpacket](*args, **(kwargs or {}), out_val=out)
            self.flops[given[0].dtype == torch.float32] += count
        return out


def training_pass(model: torch.nn.Module, preset: dict[str, Any], batch: int = 2, device: str = "cpu") -> None:
    side, channels = preset["resolution"], preset.get("channels", 3)
    x = torch.zeros(batch, channels, side, side, device=device)
    label = torch.zeros(batch, dtype=torch.int64, device=device) if preset.get("num_classes") else None
    state = None
    for _ in range(2 if getattr(model, "carries_state", False) else 1):
        prediction, state = model(x, torch.zeros(batch, device=device), label, state)
    prediction.float().square().mean().backward()


@pytest.fixture
def attended(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Tensor, ...]]:
    """The (q, k, v) of every fused attention."""
    calls: list[tuple[Tensor, ...]] = []
    original = F.scaled_dot_product_attention

    def record(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        calls.append((q, k, v))
        return original(q, k, v, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", record)
    return calls


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("name", EVERY)
def test_attention_is_what_fused_kernels_take_in_every_memory_format(name, memory_format, attended):
    """Head widths divisible by 8 need no padding; neighbouring channels must be neighbours in memory."""
    with torch.device("meta"):
        model = create_model(name).to(memory_format=memory_format)
        side, channels = PRESETS[name]["resolution"], PRESETS[name].get("channels", 3)
        x = torch.zeros(1, channels, side, side).contiguous(memory_format=memory_format)
        with torch.no_grad():
            model(x, torch.zeros(1))
    assert attended
    assert all(t.stride(-1) == 1 for call in attended for t in call)
    widths = {t.shape[-1] for call in attended for t in call}
    assert widths == {52} if name in HEADS_OF_52 else all(width % 8 == 0 for width in widths)


@pytest.mark.parametrize("name", EVERY)
def test_in_bf16_hardly_any_matrix_product_is_in_float32(name):
    """A tensor core has no float32: 1 % of the FLOPs there take as long as 15 % in bf16 (H200: 67 and 989 TFLOP/s)."""
    with torch.device("meta"):
        model = create_model(name).train()
    with FakeTensorMode():
        make_fake(model)
        with Operations() as counted, torch.autocast("cpu", torch.bfloat16):
            training_pass(model, PRESETS[name])
    low, high = counted.flops[False], counted.flops[True]
    assert high < 0.02 * (low + high)


@pytest.mark.parametrize("name", sorted(FAST - {"unet-cifar10"}))
@pytest.mark.parametrize("height", [32, 40])
def test_a_pass_makes_nothing_on_the_host_and_reads_nothing_back(name, height):
    """A tensor made on the host is copied to the GPU, which waits for it and cannot capture the pass as a graph."""
    with torch.device("meta"):
        model = create_model(name)
    x = torch.zeros(2, 3, height, 32, device="meta")
    with Operations() as seen:
        prediction, _ = model(x, torch.zeros(2, device="meta"))
        prediction.sum().backward()
    assert [name for name, _, _, made in seen.seen if any(t.device.type != "meta" for t in made)] == []


@pytest.mark.parametrize("name", EVERY)
def test_training_needs_no_operation_without_a_deterministic_kernel(name):
    with torch.device("meta"):
        model = create_model(name).train()
    with Operations() as seen:
        training_pass(model, PRESETS[name], batch=1, device="meta")
    assert {name for name, *_ in seen.seen} & NOT_DETERMINISTIC == set()
