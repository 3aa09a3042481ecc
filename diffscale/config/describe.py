"""Every setting with its type, default and description, read from the settings models."""

from __future__ import annotations

import types
import typing
from collections.abc import Iterator
from typing import Any, NamedTuple

import annotated_types
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from diffscale.config.experiment import Experiment
from diffscale.config.unions import Choice
from diffscale.core.errors import UserError
from diffscale.core.text import nearest


class Setting(NamedTuple):
    """One setting. A setting of one alternative of a union names the alternative: `model[unet].num_blocks`."""

    key: str
    type: str  # with the range: "float, above 0, at most 1"
    default: str
    description: str


def all_settings() -> list[Setting]:
    """Return every setting in the order of the schema."""
    return list(_walk(Experiment, ""))


def find_settings(key: str) -> list[Setting]:
    """Return the settings whose dotted key is `key`, begins with it, or names it without an alternative's name.

    Raises UserError with the nearest key if there is none.
    """
    every = all_settings()
    found = [s for s in every if _matches(s.key, key)]
    if not found:
        names = {_plain(s.key) for s in every}
        names |= {name.rpartition(".")[0] for name in names if "." in name}
        raise UserError(setting="KEY", value=key, expected=_nearest_key(key, names))
    return found


def settings_table() -> str:
    """Return every setting as a Markdown table."""
    cells = (
        [f"`{s.key}`", f"`{s.type}`", f"`{s.default}`" if s.default else "", s.description] for s in all_settings()
    )
    rows = [" | ".join(cell.replace("|", "\\|") for cell in row) for row in cells]
    return "\n".join(["| key | type | default | meaning |", "|---|---|---|---|", *(f"| {row} |" for row in rows)])


def _matches(key: str, wanted: str) -> bool:
    return any(name == wanted or name.startswith((f"{wanted}.", f"{wanted}[")) for name in (key, _plain(key)))


def _plain(key: str) -> str:
    """Return the dotted key without the names of alternatives: what is written on the command line."""
    return ".".join(part.partition("[")[0] for part in key.split("."))


def _nearest_key(key: str, names: set[str]) -> str:
    same_end = sorted(name for name in names if name.rpartition(".")[2] == key.rpartition(".")[2])
    if same_end:
        return "a dotted key; the same name is in: " + ", ".join(same_end)
    text = nearest(key, names)
    near = text.partition(" (the nearest)")[0] if "(the nearest)" in text else ""
    return f"{near} (the nearest), or another key of `diffscale settings`" if near else "a key of `diffscale settings`"


def _walk(model: type[BaseModel], prefix: str) -> Iterator[Setting]:
    for name, field in model.model_fields.items():
        key = prefix + name
        models = [t for t in _members(field.annotation) if isinstance(t, type) and issubclass(t, BaseModel)]
        if models and issubclass(models[0], Choice):
            names = " or ".join(m.model_fields["name"].default for m in models)
            default = field.default if isinstance(field.default, dict) else {}
            yield Setting(f"{key}.name", names, str(default.get("name", "")), field.description or "")
            for m in models:
                own = m.model_fields["name"].default
                for inner, f in m.model_fields.items():
                    if inner != "name":
                        given = default.get(inner) if default.get("name") == own else None
                        text = _default(f) if given is None else str(given)
                        yield Setting(f"{key}[{own}].{inner}", _type_of(f), text, f.description or "")
        elif models:
            yield from _walk(models[0], f"{key}.")
        else:
            yield Setting(key, _type_of(field), _default(field), field.description or "")


def _members(annotation: Any) -> list[Any]:
    """Return the alternatives of a union, or the type itself."""
    origin = typing.get_origin(annotation)
    if origin is typing.Annotated:
        return _members(typing.get_args(annotation)[0])
    if origin in (typing.Union, types.UnionType):
        return [member for option in typing.get_args(annotation) for member in _members(option)]
    return [annotation]


TECHNICAL = 1e6
"""Upper bounds from here on only refuse slips of the keyboard: they are not listed."""


def _type_of(field: FieldInfo) -> str:
    """Return the type of a setting with its range."""
    name, bounds = _type(field.annotation), _range(field.metadata)
    if name.endswith(" or null") and bounds:
        return f"{name.removesuffix(' or null')}{bounds}, or null"
    return name + bounds


def _range(metadata: typing.Iterable[Any]) -> str:
    """Return the bounds of a number as they are read after its type: ", 1 to 1000"."""
    low = next((f"at least {m.ge:g}" for m in metadata if isinstance(m, annotated_types.Ge)), "")
    low = low or next((f"above {m.gt:g}" for m in metadata if isinstance(m, annotated_types.Gt)), "")
    ends = (float(m.le) for m in metadata if isinstance(m, annotated_types.Le))  # type: ignore[arg-type]
    high = next((f"at most {end:g}" for end in ends if end < TECHNICAL), "")
    high = high or next((f"below {m.lt:g}" for m in metadata if isinstance(m, annotated_types.Lt)), "")
    if low.startswith("at least") and high.startswith("at most"):
        return f", {low.removeprefix('at least ')} to {high.removeprefix('at most ')}"
    return "".join(f", {bound}" for bound in (low, high) if bound)


def _type(annotation: Any) -> str:
    origin = typing.get_origin(annotation)
    if origin is typing.Annotated:
        inner, *metadata = typing.get_args(annotation)
        bounds = [b for m in metadata for b in (m.metadata if isinstance(m, FieldInfo) else [m])]
        return _type(inner) + _range(bounds)
    if origin is typing.Literal:
        return " or ".join(str(value) for value in typing.get_args(annotation))
    arguments = typing.get_args(annotation)
    if origin in (typing.Union, types.UnionType):
        options = ["null" if option is type(None) else _type(option) for option in arguments]
        return (", or " if any("," in option for option in options[:-1]) else " or ").join(options)
    if origin is tuple:
        inner = [_type(a) for a in arguments if a is not Ellipsis]
        if Ellipsis in arguments:
            return f"list of {inner[0]}"
        name, _, bounds = inner[0].partition(", ")
        return f"[{', '.join([name] * len(inner))}]" + (f", {bounds}" if bounds else "")
    return (
        getattr(annotation, "__name__", str(annotation)) if origin is None else str(annotation).replace("typing.", "")
    )


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return ""
    if field.default_factory is not None:
        return "$DIFFSCALE_STORAGE or ~/diffscale"
    value = field.default
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return f"[{', '.join(map(str, value))}]" if isinstance(value, tuple | list) else str(value)
