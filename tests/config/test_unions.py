"""Settings read from the signatures of the classes that they build."""

from __future__ import annotations

import pytest
from pydantic import TypeAdapter, ValidationError

from diffscale.config.unions import settings_from_signature, union_of


class Red:
    def __init__(self, depth: int = 3, resolution: int = 0) -> None: ...


class Blue:
    def __init__(self, width: float = 0.5) -> None: ...


COLOURS = TypeAdapter(union_of("colour", {"red": Red, "blue": Blue}, skip={"resolution"}))


def test_a_name_chooses_the_settings() -> None:
    red = COLOURS.validate_python({"name": "red", "depth": 4})
    assert red.arguments() == {"depth": 4}
    assert COLOURS.validate_python("blue").arguments() == {"width": 0.5}


@pytest.mark.parametrize("value", ["green", {"name": "red", "width": 1}, {"name": "red", "resolution": 1}])
def test_unknown_names_and_keys_are_refused(value: object) -> None:
    with pytest.raises(ValidationError):
        COLOURS.validate_python(value)


def test_a_parameter_needs_a_type_and_a_default() -> None:
    def make(depth) -> None: ...

    with pytest.raises(TypeError, match="depth"):
        settings_from_signature("colour.make", "make", make, set())
