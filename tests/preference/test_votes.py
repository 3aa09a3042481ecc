"""Votes are durable, and a question is a function of them."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import boto3
import pytest
from moto.server import ThreadedMotoServer

from diffscale.core.errors import UserError
from diffscale.preference.pairs import NOISE, Ask, next_ask
from diffscale.preference.study import Study
from diffscale.preference.votes import VoteBook, clean_name, new_row

from .conftest import make_study


@pytest.fixture(scope="module")
def bucket():
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        for key, value in {
            "AWS_ACCESS_KEY_ID": "testing",
            "AWS_SECRET_ACCESS_KEY": "testing",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        }.items():
            patch.setenv(key, value)
        boto3.client("s3").create_bucket(Bucket="preference")
        yield "s3://preference"
    server.stop()


@pytest.mark.parametrize("where", ["local", "s3"])
def test_votes_are_there_for_the_next_process(where: str, tmp_path: Path, bucket: str) -> None:
    folder = str(tmp_path) if where == "local" else bucket
    book = VoteBook(folder)
    for number, (rater, answer) in enumerate([("ann", 1), ("Bjørn ../..", 0), ("ann", -1)]):
        book.add(rater, new_row(number, Ask(0, 1, number), answer, 1.5))
    again = VoteBook(folder).read()
    assert {name: [row.answer for row in rows] for name, rows in again.items()} == {"ann": [1, -1], "Bjørn ../..": [0]}
    assert book.undo("ann")
    assert [row.answer for row in VoteBook(folder).read()["ann"]] == [1]
    assert not book.undo("nobody")


def test_a_damaged_file_is_named(study: Study, tmp_path: Path) -> None:
    study.book.add("ann", new_row(0, Ask(0, 1, 0), 1, 1.0))
    (file,) = (tmp_path / "preference" / study.study_id / "votes").iterdir()
    file.write_text(file.read_text() + '{"vote": {"number": "x"}}\n')
    with pytest.raises(UserError, match="line 3"):
        study.book.read()


@pytest.mark.parametrize("name", ["", "   ", "x" * 61])
def test_a_rater_has_a_name(name: str) -> None:
    with pytest.raises(UserError, match="rater"):
        clean_name(name)


def rate(study: Study, rater: str, count: int) -> list[Ask]:
    asks = []
    for number in range(count):
        ask = next_ask(len(study.contenders), study.items, study.book.read(), rater, study.honest)
        study.book.add(rater, new_row(number, ask, 1, 1.0))
        asks.append(ask)
    return asks


def test_every_contender_is_seen_with_checks_and_repeats(study: Study) -> None:
    asks = rate(study, "ann", 60)
    kinds = Counter(ask.kind for ask in asks)
    assert kinds == {"pair": 51, "repeat": 6, "check": 3}
    seen = Counter(side for ask in asks if ask.kind == "pair" for side in (ask.left, ask.right))
    assert min(seen[k] for k in range(3)) >= 3
    assert all(NOISE in (ask.left, ask.right) for ask in asks if ask.kind == "check")
    shown = {(ask.left, ask.right, ask.item) for ask in asks if ask.kind == "pair"}
    assert all((ask.right, ask.left, ask.item) in shown for ask in asks if ask.kind == "repeat")


def test_another_raters_votes_do_not_change_the_open_question(study: Study) -> None:
    rate(study, "ann", 12)
    before = next_ask(3, study.items, study.book.read(), "ann")
    rate(study, "ben", 5)
    assert next_ask(3, study.items, study.book.read(), "ann") == before


@pytest.mark.parametrize(
    ("names", "options", "match"),
    [
        (("one",), {}, "at least two"),
        (("a", "b"), {"question": "beauty"}, "real or label"),
        (("a", "b"), {"layout": "wall"}, "pair or grid"),
    ],
)
def test_a_study_that_cannot_be_is_refused(tmp_path: Path, names: tuple[str, ...], options: dict, match: str) -> None:
    with pytest.raises(UserError, match=match):
        make_study(tmp_path, names, **options)
