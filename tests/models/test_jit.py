"""JiT: parameters and multiply-adds as published, and the output of the authors' network."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from diffscale.models import create_model
from diffscale.models.jit import JiT

# Parameters: made by building the authors' model_jit.py (JiT_models[...]). The paper's table rounds them to 131, 133,
# 459, 462, 953 and 956 M and has 25, 26, 88, 89, 182 and 183 G multiply-adds (which it calls GFLOPs).
PUBLISHED = {
    "jit-b-16": (131_320_320, 25.2),
    "jit-b-32": (133_387_008, 25.8),
    "jit-l-16": (459_139_808, 87.9),
    "jit-l-32": (461_796_320, 88.6),
    "jit-h-16": (952_842_048, 181.9),
    "jit-h-32": (956_383_296, 182.9),
}
EXPECTED = ([-0.41598, 0.32246, -0.02275], [-0.48854, 0.45141, -0.19717])


@pytest.mark.parametrize(("name", "parameters"), [(name, p) for name, (p, _) in PUBLISHED.items()])
def test_a_published_network_has_exactly_the_published_parameters(name, parameters):
    with torch.device("meta"):
        assert sum(p.numel() for p in create_model(name).parameters()) == parameters


@pytest.mark.parametrize("name", ["jit-b-16", "jit-b-32"])
def test_multiply_adds_are_those_published(name):
    side = 256 if name.endswith("16") else 512
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        create_model(name)(torch.empty(1, 3, side, side), torch.empty(1), torch.empty(1, dtype=torch.long))
    assert counter.get_total_flops() / 2e9 == pytest.approx(PUBLISHED[name][1], abs=0.06)


def test_the_output_is_that_of_the_authors_network():
    """With parameters 0.3·cos(k), k counting all trained values in the authors' order; their network gave these."""
    model = JiT(8, 3, 5, patch_size=2, bottleneck=6, width=16, depth=2, num_heads=2, context_tokens=3, context_start=1)
    start = 0
    for parameter in authors_order(model):
        stop = start + parameter.numel()
        parameter.data = 0.3 * torch.arange(start, stop, dtype=torch.float64).cos().float().view(parameter.shape)
        start = stop
    x = torch.linspace(-2, 2, 2 * 3 * 64).view(2, 3, 8, 8)
    with torch.no_grad():
        out = model.eval()(x, torch.tensor([-1.0, 2.0]), torch.tensor([3, 5]))[0]
    assert out[0, :, 1, 2].tolist() == pytest.approx(EXPECTED[0], abs=1e-4)
    assert out[1, :, 7, 0].tolist() == pytest.approx(EXPECTED[1], abs=1e-4)


def authors_order(model: JiT) -> list[torch.nn.Parameter]:
    order: list[torch.nn.Module | torch.nn.Parameter | None] = [model.context]
    order += [model.embed_noise.linear1, model.embed_noise.linear2, model.embed_label, model.embed_patches, model.widen]
    for block in model.blocks:
        order += [block.gain1, block.q_gain, block.k_gain, block.qkv, block.out, block.gain2]
        order += [block.gate_and_value, block.down, block.modulation]
    order += [model.out_gain, model.head, model.modulation]
    return [p for part in order for p in (part.parameters() if isinstance(part, torch.nn.Module) else [part])]


def test_the_patch_is_a_sixteenth_of_the_side_by_default():
    with torch.device("meta"):
        assert [JiT(side).patch for side in (32, 64, 256, 512)] == [2, 4, 16, 32]


def test_context_tokens_join_late_and_leave_before_the_output():
    lengths = []
    model = JiT(8, patch_size=2, width=16, depth=3, num_heads=2, context_tokens=3, context_start=1)
    for block in model.blocks:
        block.register_forward_pre_hook(lambda _, args: lengths.append(args[0].shape[1]))
    model(torch.zeros(1, 3, 8, 8), torch.zeros(1))
    assert lengths == [16, 19, 19]
