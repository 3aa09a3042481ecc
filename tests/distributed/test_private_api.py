"""The private names of Ray that diffscale imports exist in the installed version: pyproject.toml bounds it for them."""

from __future__ import annotations

import ast
import importlib
from pathlib import Path

import pytest

import diffscale

PACKAGE = Path(diffscale.__file__).parent


def _private(module: str) -> bool:
    return module.split(".")[0] == "ray" and (
        any(part.startswith("_") for part in module.split(".")) or module == "ray.experimental.internal_kv"
    )


def _private_names() -> set[tuple[str, str]]:
    found = set()
    for file in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module and _private(node.module):
                found |= {(node.module, alias.name) for alias in node.names}
    return found


@pytest.mark.parametrize(("module", "name"), sorted(_private_names()))
def test_a_private_name_exists(module: str, name: str) -> None:
    assert hasattr(importlib.import_module(module), name)


def test_private_names_are_found() -> None:
    assert ("ray.experimental.internal_kv", "_internal_kv_put") in _private_names()
