"""The memory counted on fake tensors is what a real pass keeps."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from diffscale.config.factory import build_model
from diffscale.config.load import load_experiment
from diffscale.preflight.memory import count


def test_memory_counted_on_fake_tensors_is_what_a_real_pass_keeps():
    """The same hooks count on a real model on the CPU. Twice the images keep twice as much."""
    small = ["model.model_channels=16", "model.channel_mult=[1,2]", "model.num_blocks=1", "train.precision=fp32"]
    experiment = load_experiment("quickstart-unet", ["storage=/tmp/x", *small])
    data = SimpleNamespace(resolution=8, channels=3, num_classes=0)
    model = build_model(experiment, data).train()
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def keep(tensor):
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    inputs = torch.zeros(4, 3, 8, 8), torch.zeros(4)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = model(*inputs)
    parameters, activations = count(experiment, data, 4)
    assert parameters == sum(p.numel() for p in model.parameters())
    assert activations == sum(kept.values())
    assert count(experiment, data, 8)[1] == pytest.approx(2 * activations, rel=0.01)
    del output
