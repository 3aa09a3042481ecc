"""The nearest name, errors on one line, and generated parts of documents."""

from __future__ import annotations

from pathlib import Path

import pytest

from diffscale.core.errors import UserError
from diffscale.core.text import first_line, nearest, one_line, with_generated, write_generated


def test_nearest_comes_first() -> None:
    assert nearest("unett", ["rin", "unet"]) == "unet (the nearest), or one of: rin, unet"
    assert nearest("zzz", ["rin", "unet"]) == "one of: rin, unet"


def test_errors_on_one_line() -> None:
    assert one_line(ValueError("a\n  b")) == "a b"
    assert one_line("x" * 300, 10) == "x" * 10
    assert first_line(ValueError("a\nb")) == "a"
    assert one_line(ValueError()) == first_line(ValueError()) == "ValueError"


def test_generated_part_is_replaced(tmp_path: Path) -> None:
    text = "a\n<!-- t:begin -->\nold\n<!-- t:end -->\nb\n"
    assert with_generated(text, "t", "new") == "a\n<!-- t:begin -->\nnew\n<!-- t:end -->\nb\n"
    file = tmp_path / "README.md"
    file.write_text(text)
    write_generated(file, "t", "new")
    assert "new" in file.read_text()
    with pytest.raises(UserError, match="u:begin"):
        write_generated(file, "u", "new")
    with pytest.raises(UserError, match="missing"):
        write_generated(tmp_path / "missing.md", "t", "new")
