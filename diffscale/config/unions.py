"""Builds settings models from class signatures: a pydantic union over a dict of classes, chosen by `name`."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Mapping
from dataclasses import is_dataclass
from functools import reduce
from typing import Annotated, Any, Literal, get_type_hints

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, create_model


class Choice(BaseModel):
    """Settings of one alternative of a union; `name` says which."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, protected_namespaces=())

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
    hints = get_type_hints(build.__init__ if inspect.isclass(build) and not is_dataclass(build) else build)
    fields: dict[str, Any] = {"name": (Literal[name], name)}
    for parameter in inspect.signature(build).parameters.values():
        if parameter.name in skip or parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL):
            continue
        if parameter.default is parameter.empty or parameter.name not in hints:
            raise TypeError(f"{title}: parameter {parameter.name} needs a type and a default to be a setting")
        fields[parameter.name] = (hints[parameter.name], parameter.default)
    return create_model(title, __base__=Choice, **fields)
