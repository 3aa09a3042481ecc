"""Table sources of a build: Parquet and Arrow files, whose rows are images."""

from __future__ import annotations

from collections.abc import Iterator

from diffscale.data.build.decode import ImageError
from diffscale.data.build.items import BuildSource, Reading, Sample, SourceUnit
from diffscale.data.format import hf_tables


def open_table(uri: str, rows: int, reading: Reading, source: BuildSource) -> None:
    """List a table or a folder of them as units of `rows` rows. Completes `source`."""
    table = hf_tables.open_tables(uri)
    source.units = (
        SourceUnit("table", part.uri, rows=(first, last), split=part.split, extra={"columns": table.columns})
        for part in table.parts
        for first, last in part.units(rows)
    )
    source.class_names, source.latents = table.class_names, table.latents
    source.group_bytes = max((p.largest for p in table.parts if not hf_tables.is_mapped(p.uri)), default=0)


def read_table(unit: SourceUnit) -> Iterator[Sample | tuple[str, ImageError, None]]:
    """Yield (name, data, label) of each row of the unit."""
    assert unit.rows is not None
    columns = hf_tables.Columns(**unit.extra["columns"])
    numbers = {s: i for i, s in enumerate(columns.strings or ())}
    wanted = [columns.image] + ([columns.label] if columns.label else [])
    file, row = unit.uri.split("/")[-1], 0
    for group, (count, _) in enumerate(hf_tables.group_sizes(unit.uri)):
        if row + count > unit.rows[0] and row < unit.rows[1]:
            table = hf_tables.read_group(unit.uri, group, wanted).combine_chunks()
            images = table[columns.image].combine_chunks()
            labels = table[columns.label].to_pylist() if columns.label else [None] * count
            for i in range(max(0, unit.rows[0] - row), min(count, unit.rows[1] - row)):
                name, data = f"{file}:{row + i}", hf_tables.image_bytes(images, i)
                if data is None:
                    yield name, ImageError("the row has no image bytes"), None
                elif columns.label and labels[i] is None:
                    yield name, ImageError("the row has no label"), None
                else:
                    yield name, data, numbers.get(str(labels[i]), labels[i])
        row += count
