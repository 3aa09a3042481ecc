"""A page that needs no server: the pairs are inside, and the votes come back as a file."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from diffscale.core.errors import UserError
from diffscale.core.hashing import identify
from diffscale.preference.pairs import fixed_asks
from diffscale.preference.server import asset
from diffscale.preference.study import QUESTIONS, Study
from diffscale.preference.votes import clean_name, new_row

MOST_BYTES = 10_000_000  # of a file with votes
POLICY = "default-src 'none'; img-src data:; script-src 'unsafe-inline'; style-src 'unsafe-inline'"


class _Given(BaseModel):
    model_config = ConfigDict(extra="forbid")
    number: int = Field(ge=0)
    answer: int = Field(ge=-1, le=1)
    seconds: float = Field(ge=0, lt=1e6)


class _File(BaseModel):
    """The votes that the page saves."""

    model_config = ConfigDict(extra="forbid")
    study: str
    export: str
    seed: int
    count: int = Field(ge=1, le=100_000)
    rater: str
    votes: list[_Given]


def export_page(study: Study, count: int, seed: int) -> str:
    """Return the page with `count` questions as HTML. It holds no name of a contender.

    seed: of the choice of pairs, so that raters can be given different ones
    """
    asks = fixed_asks(len(study.contenders), study.items, count, study.honest, seed)
    places = sorted({(side, ask.item) for ask in asks for side in (ask.left, ask.right)}, key=lambda p: identify(p=p))
    pack = {
        "study": study.study_id,
        "export": export_id(study, count, seed),
        "seed": seed,
        "question": QUESTIONS[study.question],
        "pictures": ["data:image/png;base64," + base64.b64encode(study.picture(*p)).decode() for p in places],
        "asks": [
            {
                "left": places.index((ask.left, ask.item)),
                "right": places.index((ask.right, ask.item)),
                "label": study.label(ask.item) if study.question == "label" else "",
            }
            for ask in asks
        ],
    }
    page = asset("page.html").replace(
        '<meta charset="utf-8">',
        f'<meta charset="utf-8">\n<meta http-equiv="Content-Security-Policy" content="{POLICY}">',
    )
    page = page.replace('<link rel="stylesheet" href="/asset/page.css">', f"<style>{asset('page.css')}</style>")
    inside = json.dumps(pack).replace("<", "\\u003c")
    script = f'<script id="pack" type="application/json">{inside}</script>\n<script>{asset("page.js")}</script>'
    return page.replace('<script src="/asset/page.js"></script>', script)


def export_id(study: Study, count: int, seed: int) -> str:
    """Return what names an exported page in the files of its votes."""
    return identify(study=study.study_id, count=count, seed=seed)


def import_votes(study: Study, path: Path) -> tuple[str, int]:
    """Add the votes of a file to the study. Return the rater and the number of votes.

    Raises UserError for a file that is damaged, of another study or page, or whose votes are there already.
    """
    given = _parse(path)
    page = export_id(study, given.count, given.seed)
    if given.study != study.study_id or given.export != page:
        raise UserError(
            setting="--import",
            value=str(path),
            expected=f"votes of study {study.study_id}",
            reason=f"they are of study {given.study}" if given.study != study.study_id else "its page was altered",
            fix="give the same runs, --question, --layout and --n as for --export",
        )
    rater = clean_name(given.rater)
    rows = study.book.read().get(rater, [])
    if any(row.source == page for row in rows):
        raise UserError(
            setting="--import", value=str(path), expected="new votes", reason=f"{rater}'s votes of this page are there"
        )
    numbers = [vote.number for vote in given.votes]
    if numbers != list(range(len(numbers))) or len(numbers) > given.count:
        raise UserError(
            setting="--import", value=str(path), expected="votes 0, 1, 2, ... of the page", reason="some are missing"
        )
    asks = fixed_asks(len(study.contenders), study.items, given.count, study.honest, given.seed)
    for vote in given.votes:
        row = new_row(len(rows) + vote.number, asks[vote.number], vote.answer, vote.seconds, page)
        study.book.add(rater, row)
    return rater, len(numbers)


def _parse(path: Path) -> _File:
    reason: Any = None
    try:
        if path.stat().st_size > MOST_BYTES:
            reason = f"it has more than {MOST_BYTES:,} bytes"
        else:
            return _File.model_validate_json(path.read_bytes())
    except OSError as error:
        reason = error.strerror
    except ValidationError as error:
        first = error.errors()[0]
        reason = f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
    raise UserError(
        setting="--import", value=str(path), expected="the file that the page saved", reason=reason
    ) from None
