"""Evaluation and validation give a model its labels where it says that it has classes; so every model says so."""

from __future__ import annotations

import pytest

from diffscale.models import MODELS, create_model


@pytest.mark.parametrize("name", MODELS)
def test_a_conditional_model_says_how_many_classes_it_has(name: str) -> None:
    assert create_model(f"{name}-tiny", num_classes=3).num_classes == 3
    assert create_model(f"{name}-tiny").num_classes == 0
