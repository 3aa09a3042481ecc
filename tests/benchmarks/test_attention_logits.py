"""The study of attention logits: what it reads off a network whose logits are bounded by construction."""

from __future__ import annotations

import torch

from benchmarks.studies.attention_logits import KINDS, largest_logits
from diffscale.models import create_model


def test_normalised_queries_and_keys_bound_every_logit_by_the_root_of_the_head_width() -> None:
    """Two vectors of 32 numbers with a root mean square of 1 have a product of at most 32, over the root of 32."""
    torch.manual_seed(0)
    found = largest_logits(create_model("rin-conv-32").eval(), 32)
    assert list(found) == list(KINDS)
    assert max(found.values()) <= 32**0.5 * (1 + 1e-5)


def test_keys_that_grow_are_seen() -> None:
    torch.manual_seed(0)
    model = create_model("rin-conv-32", qk_norm=False).eval()
    before = largest_logits(model, 32)
    with torch.no_grad():
        model.blocks[1].read.kv.weight *= 1000
    assert largest_logits(model, 32)["read"] > 50 * before["read"]
