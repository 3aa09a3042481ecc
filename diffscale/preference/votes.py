"""Votes: one append-only file for each rater, durable before the next pair is shown."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass

from pydantic import BaseModel, ConfigDict, ValidationError

from diffscale.core import storage
from diffscale.core.errors import UserError
from diffscale.core.hashing import sha256_of
from diffscale.preference.strengths import Vote

MOST_NAME = 60  # characters of a rater's name


@dataclass(frozen=True)
class Row:
    """One answer of a rater; see `pairs.Ask`.

    number: of the rater's answers, from 0
    answer: 1 for left, -1 for right, 0 for equal
    seconds: from the picture to the answer
    time: in seconds since 1970
    source: of answers from a page without a server, its identity
    """

    number: int
    kind: str
    left: int
    right: int
    item: int
    answer: int
    seconds: float
    time: float
    source: str = ""


class _Line(BaseModel):
    """A line of a file: its rater, an answer, or the number of an answer that was taken back."""

    model_config = ConfigDict(extra="forbid")
    rater: str | None = None
    vote: Row | None = None
    undo: int | None = None


class VoteBook:
    """The votes of a study.

    folder: of the study, local or s3://
    """

    def __init__(self, folder: str) -> None:
        self.folder = storage.join(folder, "votes")

    def read(self) -> dict[str, list[Row]]:
        """Return the answers of every rater that stand, in order. Raises UserError for a damaged file."""
        return dict(self._parse(uri, storage.read_bytes(uri)) for uri in storage.list_files(self.folder, ".jsonl"))

    def add(self, rater: str, row: Row) -> None:
        """Append an answer and make it durable."""
        self._append(rater, _Line(vote=row))

    def undo(self, rater: str) -> bool:
        """Take back the rater's last answer. Return whether there was one."""
        rows = self.read().get(rater, [])
        if rows:
            self._append(rater, _Line(undo=rows[-1].number))
        return bool(rows)

    def _append(self, rater: str, line: _Line) -> None:
        uri = storage.join(self.folder, f"{sha256_of(rater)[:16]}.jsonl")
        try:
            before = storage.read_bytes(uri)
        except FileNotFoundError:
            before = _Line(rater=rater).model_dump_json(exclude_none=True).encode() + b"\n"
        storage.write_bytes(uri, before + line.model_dump_json(exclude_none=True).encode() + b"\n")

    def _parse(self, uri: str, data: bytes) -> tuple[str, list[Row]]:
        rater, rows = "", []
        for number, text in enumerate(data.decode("utf-8", "replace").splitlines(), 1):
            try:
                line = _Line.model_validate_json(text)
            except ValidationError as error:
                raise UserError(
                    setting=uri,
                    value=f"line {number}",
                    expected="a vote",
                    reason=error.errors()[0]["msg"],
                ) from None
            if line.rater is not None:
                rater = line.rater
            elif line.vote is not None:
                rows.append(line.vote)
            elif line.undo is not None:
                rows = [row for row in rows if row.number != line.undo]
        return rater, rows


def new_row(number: int, ask: object, answer: int, seconds: float, source: str = "") -> Row:
    """Return the row of an answer to a question that is given now."""
    return Row(number=number, answer=answer, seconds=seconds, time=time.time(), source=source, **asdict(ask))  # type: ignore[call-overload]


def clean_name(name: object) -> str:
    """Return a rater's name. Raises UserError for none or a long one."""
    text = " ".join(str(name).split())
    if not 0 < len(text) <= MOST_NAME:
        raise UserError(setting="rater", value=json.dumps(text)[:80], expected=f"a name of at most {MOST_NAME} letters")
    return text


def as_votes(votes: dict[str, list[Row]], without: tuple[str, ...] = ()) -> list[Vote]:
    """Return all answers but those to attention checks. without: names of raters that are left out."""
    return [
        Vote(row.left, row.right, row.answer, rater, row.item)
        for rater, rows in sorted(votes.items())
        for row in rows
        if row.kind != "check" and rater not in without
    ]
