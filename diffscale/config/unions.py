"""Builds settings models from class signatures: a pydantic union over a dict of classes, chosen by `name`.

A parameter's annotation gives a setting's type and range (core/ranges.py), the comment on its line the description:
`width: Size = 384,  # width of the tokens`. So each is written once, where the network or the solver is defined.
"""

from __future__ import annotations

import inspect
import operator
import re
from collections.abc import Callable, Mapping
from dataclasses import is_dataclass
from functools import cache, reduce
from typing import Annotated, Any, Literal, get_type_hints

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, create_model

_CLASS = re.compile(r"(?:class|def) (\w+)")
_PARAMETER = re.compile(r"\s+(\w+): [^#]+  # (.+)")


class Choice(BaseModel):
    """Settings of one alternative of a union; `name` says which."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, validate_default=True, protected_namespaces=(), allow_inf_nan=False
    )

    name: str

    def arguments(self) -> dict[str, Any]:
        """Return the keyword arguments of the class that `name` chooses."""
        return {k: getattr(self, k) for k in type(self).model_fields if k != "name"}


def choice(name: str, **settings: Any) -> Any:
    """Return the default of a union, which is validated like any other value."""
    return {"name": name, **settings}


def union_of(kind: str, classes: Mapping[str, Callable[..., Any]], skip: set[str] = frozenset()) -> Any:  # type: ignore[assignment]
    """Return the union of the settings of each class. A plain string is short for {"name": string}.

    kind: the dotted key of the union, for its title in error messages
    classes: name to class or function
    skip: parameters that are no settings, because the data determine them
    """
    models = [settings_from_signature(f"{kind}.{name}", name, build, skip) for name, build in classes.items()]
    union = reduce(operator.or_, models)
    return Annotated[
        union, Field(discriminator="name"), BeforeValidator(lambda v: {"name": v} if isinstance(v, str) else v)
    ]


def settings_from_signature(title: str, name: str, build: Callable[..., Any], skip: set[str]) -> type[Choice]:
    """Return a pydantic model of the keyword parameters of `build`. Raises TypeError without a type or a default."""
    of = build.__init__ if inspect.isclass(build) and not is_dataclass(build) else build
    hints, comments = get_type_hints(of, include_extras=True), comments_of(build)
    fields: dict[str, Any] = {"name": (Literal[name], Field(name, description="which one"))}
    for parameter in inspect.signature(build).parameters.values():
        if parameter.name in skip or parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL):
            continue
        if parameter.default is parameter.empty or parameter.name not in hints:
            raise TypeError(f"{title}: parameter {parameter.name} needs a type and a default to be a setting")
        default = Field(parameter.default, description=comments.get(parameter.name))
        fields[parameter.name] = (hints[parameter.name], default)
    return create_model(title, __base__=Choice, **fields)


def comments_of(build: Callable[..., Any]) -> dict[str, str]:
    """Return the comment on the line of each parameter, those of base classes included; none without the source."""
    classes = build.__mro__ if inspect.isclass(build) else [build]
    found: dict[str, str] = {}
    for one in reversed(classes):
        if one.__module__ != "builtins" and not one.__module__.startswith("torch."):
            found |= _comments_in(inspect.getsourcefile(one) or "").get(one.__name__, {})
    return found


@cache
def _comments_in(file: str) -> dict[str, dict[str, str]]:
    """Return the comments of a source file by class (or function) and parameter."""
    comments: dict[str, dict[str, str]] = {}
    inside: dict[str, str] = {}
    try:
        with open(file, encoding="utf-8") as lines:
            for line in lines:
                if begun := _CLASS.match(line):
                    inside = comments.setdefault(begun[1], {})
                elif parameter := _PARAMETER.match(line):
                    inside.setdefault(parameter[1], parameter[2].strip())
    except OSError:  # an installation without sources
        return {}
    return comments
