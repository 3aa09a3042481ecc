"""Every setting with its type, default and description, read from the settings models."""

from __future__ import annotations

import types
import typing
from collections.abc import Iterator
from typing import Any, NamedTuple

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from diffscale.config.experiment import Experiment
from diffscale.config.unions import Choice
from diffscale.core.errors import UserError
from diffscale.core.text import nearest


class Setting(NamedTuple):
    """One setting. A setting of one alternative of a union names the alternative: `model[unet].num_blocks`."""

    key: str
    type: str
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
                        yield Setting(f"{key}[{own}].{inner}", _type(f.annotation), text, f.description or "")
        elif models:
            yield from _walk(models[0], f"{key}.")
        else:
            yield Setting(key, _type(field.annotation), _default(field), field.description or "")


def _members(annotation: Any) -> list[Any]:
    """Return the alternatives of a union, or the type itself."""
    origin = typing.get_origin(annotation)
    if origin is typing.Annotated:
        return _members(typing.get_args(annotation)[0])
    if origin in (typing.Union, types.UnionType):
        return [member for option in typing.get_args(annotation) for member in _members(option)]
    return [annotation]


def _type(annotation: Any) -> str:
    origin = typing.get_origin(annotation)
    if origin is typing.Literal:
        return " or ".join(str(value) for value in typing.get_args(annotation))
    members = _members(annotation)
    if len(members) > 1:
        return " or ".join("null" if m is type(None) else _type(m) for m in members)
    if typing.get_origin(members[0]) is tuple:
        inner = [_type(a) for a in typing.get_args(members[0]) if a is not Ellipsis]
        return f"list of {inner[0]}" if Ellipsis in typing.get_args(members[0]) else f"[{', '.join(inner)}]"
    return (
        getattr(members[0], "__name__", str(members[0]))
        if origin is None or members[0] is not annotation
        else (str(annotation).replace("typing.", ""))
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
