"""The rating page's server: nothing without the token, nothing that names a contender, and no vote for another pair."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
from aiohttp.test_utils import TestClient, TestServer

from diffscale.preference.server import COOKIE, RatingServer
from diffscale.preference.study import Study

from .conftest import make_study

TOKEN = "t" * 24
Talk = Callable[[TestClient], Awaitable[None]]


def talk(study: Study, conversation: Talk, token: str | None = TOKEN) -> None:
    async def run() -> None:
        cookies = {COOKIE: token} if token else {}
        async with TestClient(TestServer(RatingServer(study, 20, TOKEN).app), cookies=cookies) as client:
            await conversation(client)

    asyncio.run(run())


@pytest.mark.parametrize("token", [None, "wrong", TOKEN[:-1], ""])
@pytest.mark.parametrize("path", ["/", "/state?rater=a", "/asset/page.js", "/picture/x", "/vote", "/undo", "/nowhere"])
def test_nothing_is_reachable_without_the_token(study: Study, token: str | None, path: str) -> None:
    async def conversation(client: TestClient) -> None:
        for method in ("GET", "POST"):
            answer = await client.request(method, path, data="{}")
            assert answer.status == 403
            assert "picture?" not in await answer.text()
        assert study.book.read() == {}

    talk(study, conversation, token)


def test_a_link_opens_the_page_and_its_token_leaves_the_address(study: Study) -> None:
    async def conversation(client: TestClient) -> None:
        first = await client.get(f"/?token={TOKEN}", allow_redirects=False)
        assert (first.status, first.headers["Location"]) == (303, "/")
        cookie = first.headers["Set-Cookie"]
        assert "HttpOnly" in cookie
        assert "SameSite=Strict" in cookie
        page = await client.get("/", cookies={COOKIE: TOKEN})
        assert "Which picture?" in await page.text()
        assert "default-src 'none'" in page.headers["Content-Security-Policy"]

    talk(study, conversation, None)


@pytest.mark.parametrize("name", ["../server.py", "..%2Fserver.py", "%2e%2e/study.py", "page.html", "/etc/passwd", "x"])
def test_file_names_in_requests_do_not_leave_the_folder(study: Study, name: str) -> None:
    async def conversation(client: TestClient) -> None:
        for route in ("asset", "picture"):
            assert (await client.get(f"/{route}/{name}")).status == 404

    talk(study, conversation)


def test_votes_are_counted_once_for_the_pair_that_was_shown(study: Study) -> None:
    async def conversation(client: TestClient) -> None:
        state = await (await client.get("/state?rater=ann")).json()
        vote = {"rater": "ann", "id": state["id"], "answer": 1, "seconds": 2.5}
        after = await (await client.post("/vote", json=vote)).json()
        assert after["number"] == 1
        again = await (await client.post("/vote", json=vote)).json()  # a second click, or another tab
        assert (again["number"], again["id"]) == (1, after["id"])
        assert [row.answer for row in study.book.read()["ann"]] == [1]
        back = await (await client.post("/undo", json={"rater": "ann"})).json()
        assert (back["number"], back["id"]) == (0, state["id"])

    talk(study, conversation)


def test_a_rater_goes_on_after_a_crash_with_the_same_question(study: Study) -> None:
    states = []

    async def conversation(client: TestClient) -> None:
        state = await (await client.get("/state?rater=ann")).json()
        states.append(state["id"])
        vote = {"rater": "ann", "id": state["id"], "answer": 0, "seconds": 1}
        states.append((await (await client.post("/vote", json=vote)).json())["id"])

    talk(study, conversation)

    async def later(client: TestClient) -> None:
        assert (await (await client.get("/state?rater=ann")).json())["id"] == states[1]

    talk(study, later)


@pytest.mark.parametrize(
    "body",
    [
        "",
        "[]",
        "{",
        '{"rater": ""}',
        '{"rater": "a", "answer": 2, "seconds": 1}',
        '{"rater": "a", "answer": true, "seconds": 1}',
        '{"rater": "a", "answer": 1, "seconds": "x"}',
        '{"rater": "a", "answer": 1, "seconds": NaN}',
        json.dumps({"rater": "x" * 3000, "answer": 1, "seconds": 1}),
    ],
)
def test_a_bad_vote_is_refused_in_a_sentence(study: Study, body: str) -> None:
    async def conversation(client: TestClient) -> None:
        answer = await client.post("/vote", data=body)
        assert answer.status == 400
        assert "expected" in (await answer.json())["error"]
        assert study.book.read() == {}

    talk(study, conversation)


@pytest.mark.parametrize("layout", ["pair", "grid"])
def test_a_rater_cannot_tell_the_contenders(tmp_path: Path, layout: str) -> None:
    study = make_study(tmp_path, layout=layout, question="label" if layout == "pair" else "real")

    async def conversation(client: TestClient) -> None:
        addresses = set()
        for number in range(12):
            answer = await client.get("/state?rater=<b>ann</b>")
            text = await answer.text()
            assert not [name for name in (*study.names, str(tmp_path), study.study_id) if name in text]
            state = json.loads(text)
            assert state["number"] == number
            for side in ("left", "right"):
                assert state[side] not in addresses  # a new address for every look, also of the same picture
                addresses.add(state[side])
                picture = await client.get(state[side])
                assert (await picture.read())[:4] == b"\x89PNG"
            vote = {"rater": "<b>ann</b>", "id": state["id"], "answer": 1, "seconds": 1}
            await client.post("/vote", json=vote)

    talk(study, conversation)
