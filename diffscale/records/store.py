"""Reading and writing records.

A run's folder holds one immutable JSON file per row (`records/<record_id>.json`), so writing a row twice changes
nothing, concurrent writers are safe and a report can be recomputed at any time from these files alone. The rows of
finished runs may also be in one file `records.jsonl`, a line of JSON for each.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from pydantic import ValidationError

from diffscale.core import storage
from diffscale.core.errors import UserError
from diffscale.core.text import first_line
from diffscale.records.remote import fetch_texts
from diffscale.records.schema import SCHEMA_VERSION, Record

if TYPE_CHECKING:
    import pandas as pd

RECORDS_FILE = "records.jsonl"
"""Name of a file that holds the rows of many runs, one line of JSON each."""


def write_record(run_folder: str, record: Record) -> str:
    """Append the row durably and return its URI. A row that exists already stays unchanged."""
    uri = storage.join(run_folder, "records", f"{record.record_id}.json")
    if not storage.exists(uri):
        storage.write_bytes(uri, json.dumps(_as_json(record), indent=1, allow_nan=False).encode())
    return uri


def read_records(places: Iterable[str]) -> list[Record]:
    """Return every row under run folders, folders of runs, or record files, each once.

    Two folders hold the same run where another command trained it too, such as a trial of a sweep. Of a row in both
    the older is returned, and all rows of a run have the name of its oldest one.

    Raises UserError that names the file if one is damaged, or the place if it does not exist.
    """
    rows: dict[str, Record] = {}
    for place in places:
        place = storage.check_absolute(place, "RUNS")
        if not storage.exists(place):
            raise UserError(setting="RUNS", value=place, expected="a run's folder, a folder of runs or a record file")
        for file, text in _texts(place):
            for row in _rows_of_file(text, file) if file.endswith(".jsonl") else [_record(text, file)]:
                known = rows.get(row.record_id)
                rows[row.record_id] = row if known is None else min(known, row, key=_age)
    return _in_order(_with_one_name(rows.values()))


def _with_one_name(records: Iterable[Record]) -> list[Record]:
    """Return the rows with one name for each run, that of its oldest row."""
    oldest: dict[str, Record] = {}
    records = list(records)
    for row in records:
        oldest[row.run_id] = min(oldest.get(row.run_id, row), row, key=_age)
    names = {run: row.run_name for run, row in oldest.items()}
    return [r if r.run_name == names[r.run_id] else r.model_copy(update={"run_name": names[r.run_id]}) for r in records]


def _age(record: Record) -> tuple[str, str]:
    return record.created, record.run_name


def records_of_run(run_folder: str) -> list[Record]:
    """Return the rows of a run, without those in a file of many runs, by the names of their files.

    Raises UserError that names a damaged record.
    """
    return [_record(text, uri) for uri, text in _texts(storage.join(run_folder, "records")) if uri.endswith(".json")]


def _texts(place: str) -> Iterator[tuple[str, bytes]]:
    """Yield the URI and the content of each file with records: a file itself, or those under a folder."""
    if place.endswith((".json", ".jsonl")):
        yield place, storage.read_bytes(place)
    elif storage.is_remote(place):
        yield from fetch_texts(place, _holds_records).items()
    else:
        yield from ((f, storage.read_bytes(f)) for f in storage.list_files(place, recursive=True) if _holds_records(f))


def write_records_file(uri: str, records: Iterable[Record]) -> None:
    """Write rows into one file, a line of JSON for each, in the order in which `read_records` returns them."""
    lines = [json.dumps(_as_json(row), separators=(",", ":"), allow_nan=False) for row in _in_order(records)]
    storage.write_bytes(uri, "".join(line + "\n" for line in lines).encode())


def read_records_file(uri: str) -> list[Record]:
    """Return the rows of a file that `write_records_file` wrote. Raises UserError that names a damaged line."""
    return _rows_of_file(storage.read_bytes(uri), uri)


def _rows_of_file(text: bytes, uri: str) -> list[Record]:
    return [_record(line, f"{uri}, line {number}") for number, line in enumerate(text.splitlines(), 1)]


def _in_order(records: Iterable[Record]) -> list[Record]:
    return sorted(records, key=lambda r: (r.run_name, r.run_id, r.images_seen, r.metric, r.record_id))


def _holds_records(uri: str) -> bool:
    return (uri.endswith(".json") and "/records/" in uri) or uri.rpartition("/")[2] == RECORDS_FILE


def read_record(uri: str) -> Record:
    """Return the row of a file that `write_record` wrote. Raises UserError that names a damaged file."""
    return _record(storage.read_bytes(uri), uri)


def _record(text: bytes, where: str) -> Record:
    try:
        data = json.loads(text)
        if isinstance(data, dict) and data.get("schema_version") != SCHEMA_VERSION:
            raise ValueError(f"schema_version {data.get('schema_version')!r}, this diffscale reads {SCHEMA_VERSION}")
        return Record.model_validate(data)
    except (ValueError, ValidationError, RecursionError) as error:
        raise UserError(
            setting="record",
            value=where,
            expected="a record of diffscale",
            reason=_reason(error),
            fix="move the damaged file away; the evaluation can be repeated",
        ) from None


def to_frame(records: Iterable[Record]) -> pd.DataFrame:
    """Return the rows as a table with a record's columns in order; `settings` and `versions` stay objects."""
    import pandas as pd  # import cost

    rows, names = list(records), list(Record.model_fields)
    return pd.DataFrame({name: [getattr(row, name) for row in rows] for name in names}, columns=names)


def _as_json(record: Record) -> dict[str, object]:
    return {name: _plain(value) for name, value in record.model_dump().items()}


def _plain(value: object) -> object:
    """Return nan and inf as words, which JSON has no numbers for and which are read back as the numbers."""
    if isinstance(value, dict):
        return {name: _plain(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _reason(error: Exception) -> str:
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        return f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
    return first_line(error)
