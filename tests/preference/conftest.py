from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from diffscale.preference.study import Contender, Study


def pictures(seed: int, count: int = 32) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, 8, 8, 3), np.uint8)


def make_study(
    place: Path | str, names: tuple[str, ...] = ("secret-unet", "secret-dit", "secret-rin"), **options
) -> Study:
    labels = tuple(["cat", "dog"][i % 2] for i in range(32))
    contenders = [Contender(name, pictures(i), labels, f"origin-{i}") for i, name in enumerate(names)]
    return Study(contenders, place=str(place), **options)


@pytest.fixture
def study(tmp_path: Path) -> Study:
    return make_study(tmp_path)
