"""Table sources of a build: Parquet and Arrow files, whose rows are images."""

from __future__ import annotations

from collections.abc import Iterator

from diffscale.core.errors import UserError
from diffscale.data.build.decode import ImageError
from diffscale.data.build.items import BuildSource, Label, Reading, Sample, SourceUnit
from diffscale.data.format import hf_tables
from diffscale.data.format.hf_choices import NONE, Choices
from diffscale.data.format.hf_columns import Columns
from diffscale.data.format.hf_labels import NO_LABEL, LabelError, distinct


def open_table(uri: str, rows: int, reading: Reading, source: BuildSource) -> None:
    """List a table or a folder of them as units of `rows` rows. Completes `source`.

    Raises UserError where the configuration, the split or a column is not decided by the files nor by `reading`."""
    choices = Choices(
        config=reading.config,
        image_column=reading.image_column,
        label_column=reading.label_column,
        split_names=reading.split_names,
        command=True,
    )
    table = hf_tables.open_tables(uri, choices)
    parts, names = table.parts, list(table.classes.names)
    if names and "heldout" not in table.labels:  # a built dataset with classes has a label for every image
        source.left_out += [
            (
                part.uri.removeprefix(uri.rstrip("/") + "/"),
                f"its rows have no labels (--label-column {NONE} uses them)",
            )
            for part in parts
            if part.split == "heldout"
        ]
        parts = [part for part in parts if part.split == "train"]
    source.units = (
        SourceUnit("table", part.uri, rows=(first, last), split=part.split, extra={"columns": table.columns})
        for part in parts
        for first, last in part.units(rows)
    )
    source.class_names, source.latents = names, table.latents
    source.group_bytes = max((p.largest for p in parts if not hf_tables.is_mapped(p.uri)), default=0)
    source.left_out += table.left_out
    source.notes.append(f"images: column {table.columns.image}; labels: {_labels_of(table)}")
    source.counts = {}
    for split in {part.split for part in parts}:
        found = table.labels.get(split)
        for name, count in zip(names, found.counts if found else (), strict=False):
            source.counts[split, name] = count
        if found is None:
            source.counts[split, None] = sum(part.rows for part in parts if part.split == split)


def _labels_of(table: hf_tables.Tables) -> str:
    if table.columns.label:
        return f"column {table.columns.label}"
    return f"none (the columns are {', '.join(table.schema.names)})"


def read_table(unit: SourceUnit) -> Iterator[Sample | tuple[str, ImageError, None]]:
    """Yield (name, data, label) of each row of the unit."""
    assert unit.rows is not None
    given = unit.extra["columns"]  # an earlier version that was interrupted wrote `strings`
    columns = Columns(given["image"], given["label"], given.get("numbered", given.get("strings") is None))
    file, row = unit.uri.split("/")[-1], 0
    for group, (count, _) in enumerate(hf_tables.group_sizes(unit.uri)):
        if row + count > unit.rows[0] and row < unit.rows[1]:
            table = hf_tables.read_group(unit.uri, group, columns.names).combine_chunks()
            images = table[columns.image].combine_chunks()
            try:
                values, codes = distinct(table[columns.label]) if columns.label else ([None], [0] * count)
            except LabelError as error:
                raise UserError(
                    setting="SOURCE", value=unit.uri, expected="the labels that were listed", reason=str(error)
                ) from None
            for i in range(max(0, unit.rows[0] - row), min(count, unit.rows[1] - row)):
                name, data, value = f"{file}:{row + i}", hf_tables.image_bytes(images, i), values[codes[i]]
                if data is None:
                    yield name, ImageError("the row has no image bytes"), None
                elif columns.label and value in (None, NO_LABEL):
                    yield name, ImageError("the row has no label"), None
                else:
                    yield name, data, _label(value, columns)
        row += count


def _label(value: Label, columns: Columns) -> Label:
    return value if columns.numbered or value is None else str(value)
