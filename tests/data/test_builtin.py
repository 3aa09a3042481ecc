"""The images in the package: `builtin:few-emoji` holds the kinds that it names and no other emoji."""

from __future__ import annotations

from pathlib import Path

import pytest

from diffscale.core.errors import UserError
from diffscale.data import open_dataset, resolve
from diffscale.data.build.few_emoji import KINDS


def test_few_emoji_has_every_emoji_that_it_names_under_its_kind(tmp_path: Path) -> None:
    folder = resolve("builtin:few-emoji", 8, str(tmp_path))
    dataset, heldout = open_dataset(folder), open_dataset(folder, "heldout")
    assert dataset.n + heldout.n == sum(map(len, KINDS.values()))
    both = zip(dataset.class_counts, heldout.class_counts, strict=True)
    assert [a + b for a, b in both] == [len(names) for names in KINDS.values()]
    assert heldout.n > 1  # the least that memorisation and the distance to unseen images need
    assert folder != resolve("builtin:emoji", 8, str(tmp_path))


def test_another_name_in_the_package_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="builtin:few-emoji"):
        resolve("builtin:faces", 16, str(tmp_path))
