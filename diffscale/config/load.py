"""Loads settings from a preset or a file with dotted overrides, and explains what is wrong with them."""

from __future__ import annotations

import re
import typing
from collections.abc import Iterable
from importlib import resources
from os.path import exists
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import ValidationError
from yaml import YAMLError

from diffscale.core.errors import UserError
from diffscale.core.storage import resolve
from diffscale.core.text import nearest, one_line

_BOUNDS = {
    "greater_than_equal": "at least {ge:g}",
    "greater_than": "above {gt:g}",
    "less_than_equal": "at most {le:g}",
    "less_than": "below {lt:g}",
    "finite_number": "a finite number",
    "int_parsing": "a whole number",
    "int_parsing_size": "a whole number of at most 19 digits",
    "int_from_float": "a whole number",
    "float_parsing": "a number",
}
"""What is valid, by pydantic's kind of error."""

if TYPE_CHECKING:
    from diffscale.config.experiment import Experiment

MISSING = "???"
"""What stands for a value that a preset leaves to the user."""
BUILTIN = "builtin:"
"""What the names of datasets in the package begin with."""


def preset_names(kind: str = "presets") -> list[str]:
    """Return the names of the presets (or of the sweeps, kind='sweeps') in the package."""
    folder = resources.files("diffscale.config") / kind
    return sorted(Path(f.name).stem for f in folder.iterdir() if f.name.endswith(".yaml"))


def load_tree(preset_or_file: str, kind: str = "presets") -> dict[str, Any]:
    """Return the settings of a preset or a YAML file, merged over the settings of its `base`."""
    tree = read_tree(preset_or_file, kind)
    if kind != "presets":
        return tree
    base, _ = tree.pop("base", None), tree.pop("recipe", None)
    # The preset of a model becomes its settings here, so that an override meets its name and its fields.
    return _expand_model_preset(merge(load_tree(str(base)), tree) if base is not None else tree)


def read_tree(preset_or_file: str, kind: str = "presets") -> dict[str, Any]:
    """Return what a preset or a YAML file itself says, with `base` and `recipe`."""
    if preset_or_file.endswith((".yaml", ".yml")) or "/" in preset_or_file:
        path = Path(preset_or_file).expanduser()
        if not path.is_file():
            raise UserError(
                setting="PRESET_OR_FILE",
                value=preset_or_file,
                expected="a YAML file that exists, or a preset: " + ", ".join(preset_names(kind)),
            )
        text = path.read_text(encoding="utf-8", errors="replace")
    elif preset_or_file in preset_names(kind):
        text = (resources.files("diffscale.config") / kind / f"{preset_or_file}.yaml").read_text(encoding="utf-8")
    else:
        expected = nearest(preset_or_file, preset_names(kind)) + "; or a YAML file"
        raise UserError(setting="PRESET_OR_FILE", value=preset_or_file, expected=expected)
    return parse_yaml(text, preset_or_file)


def parse_yaml(text: str, source: str) -> dict[str, Any]:
    """Return a YAML mapping as plain values. `${section.key}` refers to another key.

    Resolvers that read the environment are off, so that no secret gets into settings, which are saved and published.
    """
    try:
        OmegaConf.clear_resolver("oc.env")
        tree = OmegaConf.create(text)
        if not isinstance(tree, DictConfig):
            raise ValueError("not a mapping of settings")
        return OmegaConf.to_container(tree, resolve=True)  # type: ignore[return-value]
    except (YAMLError, OmegaConfBaseException, ValueError, RecursionError, TypeError, AttributeError) as error:
        expected = "a YAML mapping of settings"
        raise UserError(setting="PRESET_OR_FILE", value=source, expected=expected, reason=one_line(error)) from None


def parse_overrides(overrides: Iterable[str]) -> dict[str, Any]:
    """Return overrides such as `["train.images=1e6", "model.name=rin"]` as a tree."""
    for item in overrides:
        if not re.match(r"^[A-Za-z_][\w.]*=", item):
            raise UserError(setting="OVERRIDE", value=item, expected="a dotted key and a value: train.global_batch=128")
    try:
        OmegaConf.clear_resolver("oc.env")
        return OmegaConf.to_container(OmegaConf.from_dotlist(list(overrides)), resolve=True)  # type: ignore[return-value]
    except (YAMLError, OmegaConfBaseException, ValueError) as error:
        expected = "dotted keys with YAML values"
        raise UserError(
            setting="OVERRIDE", value=" ".join(overrides), expected=expected, reason=one_line(error)
        ) from None


def merge(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """Return the settings `below` with `above` overriding them.

    A section whose `name` changes starts afresh, since the settings of another backbone or schedule mean nothing to the
    new one. A plain string for a section with a name is short for that name.
    """
    out = dict(below)
    for key, value in above.items():
        old = out.get(key)
        if isinstance(old, dict) and isinstance(value, str) and "name" in old:
            value = {"name": value}
        if isinstance(old, dict) and isinstance(value, dict):
            renamed = "name" in value and "name" in old and value["name"] != old["name"]
            out[key] = value if renamed or "preset" in value else merge(old, value)
        else:
            out[key] = value
    return out


def load_experiment(preset_or_file: str, overrides: Iterable[str] = ()) -> Experiment:
    """Return PRESET_OR_FILE [key=value ...] as validated settings. Raises UserError with the key and the nearest."""
    return validate(merge(load_tree(preset_or_file), parse_overrides(overrides)))


def validate(tree: dict[str, Any]) -> Experiment:
    """Return a tree of settings as an Experiment, with relative paths resolved. Raises UserError for the first mistake.

    `storage` and `data.path` may be relative to the working directory, except in a Ray job: see `storage.resolve`.
    """
    from diffscale.config.experiment import Experiment  # import cost

    tree = _expand_model_preset(tree)
    if isinstance(data := tree.get("data"), dict) and data.get("path") == MISSING:
        expected = "the folder of a dataset, which this preset leaves to you: data.path=FOLDER"
        raise UserError(setting="data.path", value=MISSING, expected=expected, fix="diffscale data build makes one")
    tree = resolve_paths(tree)
    try:
        return Experiment.model_validate(tree)
    except ValidationError as error:
        raise explain(error, Experiment, tree) from None


def resolve_paths(tree: dict[str, Any]) -> dict[str, Any]:
    """Return the tree with absolute `storage` and `data.path`, and other places if they exist."""
    if isinstance(place := tree.get("storage"), str):
        tree = tree | {"storage": resolve(place)}
    data = tree.get("data")
    if isinstance(data, dict) and isinstance(path := data.get("path"), str) and not path.startswith(BUILTIN):
        tree = tree | {"data": data | {"path": resolve(path, "data.path")}}
    for section, name in (("data", "decoder"), ("eval", "reference"), ("eval", "guide")):
        part = tree.get(section)
        if isinstance(part, dict) and isinstance(place := part.get(name), str) and exists(place):
            tree = tree | {section: part | {name: resolve(place, f"{section}.{name}")}}
    return tree


def _expand_model_preset(tree: dict[str, Any]) -> dict[str, Any]:
    """Replace `model: {preset: NAME, ...}` by the settings of a published size, which further keys override."""
    model = tree.get("model")
    if not (isinstance(model, dict) and "preset" in model):
        return tree
    from diffscale.models.presets import PRESETS  # import cost

    rest = {k: v for k, v in model.items() if k != "preset"}
    name = str(model["preset"])
    if name not in PRESETS:
        raise UserError(setting="model.preset", value=name, expected=nearest(name, PRESETS))
    given = {k: v for k, v in PRESETS[name].items() if k not in ("resolution", "channels", "num_classes")}
    return tree | {"model": merge(given, rest)}


def explain(error: ValidationError, schema: Any, tree: dict[str, Any]) -> UserError:
    """Return the first mistake in the settings as a UserError."""
    first = error.errors()[0]
    location, kind, context = [str(p) for p in first["loc"]], first["type"], first.get("ctx", {})
    # A chosen alternative of a union puts its name into the location: leave it out of the dotted key.
    dotted = ".".join(_without_tags(location, tree))
    if kind == "extra_forbidden":
        known = _known_keys(schema, location[:-1])
        return UserError(setting=dotted, value=first["input"], expected="a known key: " + nearest(location[-1], known))
    if kind in ("union_tag_invalid", "union_tag_not_found"):
        tags = [t.strip(" '") for t in str(context.get("expected_tags", "")).split(",") if t.strip()]
        tag = str(context.get("tag", ""))
        return UserError(setting=f"{dotted}.name", value=tag, expected=nearest(tag, tags) if tags else first["msg"])
    if kind == "literal_error":
        choices = re.findall(r"'([^']*)'", str(context.get("expected", "")))
        if not choices:
            return UserError(setting=dotted, value=first["input"], expected=f"one of {context.get('expected')}")
        return UserError(setting=dotted, value=first["input"], expected=nearest(str(first["input"]), choices))
    if kind == "missing":
        return UserError(setting=dotted, value=None, expected="a value; it has no default")
    if isinstance(context.get("error"), UserError):
        return context["error"]
    bound = _BOUNDS.get(kind)
    message = bound.format(**context) if bound else first["msg"].removeprefix("Value error, ")
    value = first["input"] if dotted else tree.get("name", "")
    return UserError(setting=dotted or "(top level)", value=value, expected=message)


def _without_tags(location: list[str], tree: Any) -> list[str]:
    out = []
    for part in location:
        if isinstance(tree, dict) and part not in tree and part == tree.get("name"):
            continue
        if isinstance(tree, str) and part == tree:
            continue
        out.append(part)
        if isinstance(tree, dict):
            tree = tree.get(part)
        elif isinstance(tree, (list, tuple)) and part.isdigit() and int(part) < len(tree):
            tree = tree[int(part)]
    return out


def _known_keys(schema: Any, location: list[str]) -> list[str]:
    """Return the fields of the model that a location of a validation error leads to."""
    for part in location:
        options = [schema]
        if not (isinstance(schema, type) and part in getattr(schema, "model_fields", {})):
            options = [o for o in typing.get_args(schema) or [schema] if _tag(o) == part]
        elif isinstance(schema, type):
            options = [schema.model_fields[part].annotation]  # type: ignore[attr-defined]
        schema = options[0] if options else schema
    return list(getattr(schema, "model_fields", {}))


def _tag(option: Any) -> str | None:
    fields = getattr(option, "model_fields", {})
    return fields["name"].default if "name" in fields else None
