"""Chooses the columns of images and of labels of a table, by their declared features, types and names."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from diffscale.core.errors import UserError
from diffscale.data.format.hf_choices import NONE, Choices
from diffscale.data.format.hf_labels import MOST_CLASSES, is_label_type

IMAGE_NAMES = ("image", "img", "latent", "latents", "pixels", "png", "jpg", "webp")
LABEL_NAMES = ("label", "labels", "class", "fine_label", "target")


@dataclass(frozen=True)
class Columns:
    """Names of the columns.

    label: None without labels
    numbered: whether labels are numbers of declared classes; otherwise the values are the classes
    """

    image: str
    label: str | None
    numbered: bool = False

    @property
    def names(self) -> list[str]:
        return [self.image, *([self.label] if self.label else [])]


def features_of(schema: pa.Schema) -> dict[str, Any]:
    """Return the column features that `datasets` stores in the schema's metadata."""
    try:
        found = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
    except (KeyError, ValueError, TypeError, RecursionError):
        return {}
    return {name: f for name, f in found.items() if isinstance(f, dict)} if isinstance(found, dict) else {}


def image_column(schema: pa.Schema, choices: Choices, place: str) -> str:
    """Return the column of images: the chosen one, `image`, or the only one. Raises UserError otherwise.

    Candidates are the columns declared as images, or else those of a type that can hold one.
    """
    fitting = [name for name in schema.names if _can_hold_images(schema.field(name).type)]
    if choices.image_column is not None:
        if choices.image_column not in fitting:
            raise choices.ask("image_column", fitting, "column of images")
        return choices.image_column
    declared = [name for name in _declared(schema, "Image") if name in fitting]
    found = _the_usual(declared or fitting, IMAGE_NAMES)
    if not found:
        raise UserError(
            setting=choices.place,
            value=place,
            expected="a column of images: a struct of bytes and path, binary, or a fixed_shape_tensor",
            reason=f"its columns are {', '.join(f'{f.name} ({f.type})' for f in schema)[:400]}",
            fix="--kind folder, if the images are files" if choices.command else "",
        )
    if len(found) > 1:
        raise choices.ask("image_column", found, "column of images")
    return found[0]


def label_column(schema: pa.Schema, choices: Choices, image: str) -> str | None:
    """Return the column of labels: the chosen one, `label`, or the only one; None without. Raises UserError otherwise.

    Candidates are the columns declared as classes, and those with a usual name.
    """
    if choices.label_column == NONE:
        return None
    fitting = [name for name in schema.names if name != image and is_label_type(schema.field(name).type)]
    if choices.label_column is not None:
        if choices.label_column not in fitting:
            raise choices.ask("label_column", fitting, "column of numbers or text")
        return choices.label_column
    declared = _declared(schema, "ClassLabel")
    found = [name for name in schema.names if name != image and (name in declared or name in LABEL_NAMES)]
    found = ["label"] if "label" in found else found
    if len(found) > 1:
        raise choices.ask("label_column", [*found, NONE], "column of labels")
    if found and found[0] not in fitting:
        raise UserError(
            setting=choices.option("label_column"),
            value=found[0],
            expected="one class for each image: numbers or text",
            reason=f"the column is {schema.field(found[0]).type}",
            fix=f"choose another column, or {NONE} for images without classes",
        )
    return found[0] if found else None


def declared_names(schema: pa.Schema, column: str, place: str) -> tuple[str, ...] | None:
    """Return the class names that `datasets` stored for a column, or None. Raises UserError for too many."""
    names = features_of(schema).get(column, {}).get("names")
    if not isinstance(names, list) or not names:
        return None
    if len(names) > MOST_CLASSES:
        raise UserError(setting="classes", value=f"{len(names):,} in {place}", expected=f"at most {MOST_CLASSES:,}")
    return tuple(str(name) for name in names)


def check_alike(schemas: Sequence[tuple[str, pa.Schema]], columns: Columns, choices: Choices) -> None:
    """Raise UserError unless all files have these columns, with the same kinds of values and the same class names."""
    seen: dict[str, Any] = {}
    for uri, schema in schemas:
        kinds = {name: _kind(schema.field(name).type) for name in columns.names if name in schema.names}
        names = declared_names(schema, columns.label, uri) if columns.label else None
        found = {name: kind for name, kind in kinds.items() if kind != "null"} | ({"classes": names} if names else {})
        missing = [name for name in columns.names if name not in kinds]
        other = [name for name, value in found.items() if seen.setdefault(name, value) != value]
        if missing or other:
            raise UserError(
                setting=choices.place,
                value=uri,
                expected=f"the columns of {schemas[0][0].rsplit('/', 1)[-1]} in every file: {', '.join(columns.names)}",
                reason="this file " + ("lacks " + ", ".join(missing) if missing else "has other " + ", ".join(other)),
                fix="give the folder or the file of one dataset, or choose a configuration or columns",
            )


def first_columns(schema: pa.Schema) -> Columns:
    """Return the first columns that could be meant. Any other ones are part of a dataset's content hash."""
    fitting = [name for name in schema.names if _can_hold_images(schema.field(name).type)]
    image = next(name for name in (*_declared(schema, "Image"), *IMAGE_NAMES, *fitting) if name in fitting)
    plain = [f.name for f in schema if pa.types.is_integer(f.type) or pa.types.is_string(f.type)]
    names = (*_declared(schema, "ClassLabel"), *LABEL_NAMES)
    return Columns(image, next((name for name in names if name in plain and name != image), None))


def latents_of(kind: pa.DataType) -> tuple[str, int, int] | None:
    """Return (dtype, channels, side) of a column of float tensors, or None."""
    if isinstance(kind, pa.FixedShapeTensorType) and pa.types.is_floating(kind.value_type):
        return str(np.dtype(kind.value_type.to_pandas_dtype())), kind.shape[0], kind.shape[1]
    return None


def _can_hold_images(kind: pa.DataType) -> bool:
    if isinstance(kind, pa.FixedShapeTensorType):
        if pa.types.is_floating(kind.value_type):
            return len(kind.shape) == 3 and kind.shape[1] == kind.shape[2]
        return kind.value_type == pa.uint8() and len(kind.shape) in (2, 3)
    return pa.types.is_binary(_bytes_type(kind)) or pa.types.is_large_binary(_bytes_type(kind))


def _bytes_type(kind: pa.DataType) -> pa.DataType:
    return kind.field("bytes").type if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0 else kind


def _kind(kind: pa.DataType) -> str:
    """Return what must be equal in all files: the width of integers and the size of offsets may differ."""
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    if isinstance(kind, pa.FixedShapeTensorType):
        return str(kind)
    if _can_hold_images(kind):
        return "bytes"
    if is_label_type(kind) and not pa.types.is_null(kind):
        return "number" if pa.types.is_primitive(kind) else "text"
    return str(kind)


def _declared(schema: pa.Schema, feature: str) -> list[str]:
    return [name for name, f in features_of(schema).items() if f.get("_type") == feature and name in schema.names]


def _the_usual(found: list[str], names: tuple[str, ...]) -> list[str]:
    """Return `image` alone if it is among the candidates, else those with a usual name, else all."""
    if names[0] in found:
        return [names[0]]
    usual = [name for name in found if name in names]
    return usual or found
