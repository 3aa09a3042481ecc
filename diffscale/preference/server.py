"""The rating page: a web server that shows one pair at a time and knows nobody without the token.

aiohttp serves it: Ray depends on it already, it is maintained, and a handful of routes needs no more.
"""

from __future__ import annotations

import hmac
import json
import secrets
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from importlib import resources
from typing import Any

from aiohttp import web

from diffscale.core.errors import UserError
from diffscale.preference.pairs import Ask, next_ask
from diffscale.preference.study import QUESTIONS, Study
from diffscale.preference.votes import clean_name, new_row

COOKIE = "diffscale_token"
MOST_PICTURES = 4096  # addresses that are kept
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; img-src 'self'; script-src 'self'; style-src 'self'; "
    "connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}
ASSETS = {"page.js": "text/javascript", "page.css": "text/css"}
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def asset(name: str) -> str:
    """Return the text of a file of the page."""
    return resources.files("diffscale.preference").joinpath("assets", name).read_text(encoding="utf-8")


class RatingServer:
    """The routes of a study's page.

    goal: answers that each rater is asked for
    token: what a visitor's link must contain
    """

    def __init__(self, study: Study, goal: int, token: str) -> None:
        self.study, self.goal, self.token = study, goal, token
        self.pictures: OrderedDict[str, tuple[int, int]] = OrderedDict()
        self.app = web.Application(middlewares=[self._guard], client_max_size=4096)
        self.app.add_routes(
            [
                web.get("/", self.page),
                web.get("/asset/{name}", self.asset),
                web.get("/picture/{key}", self.picture),
                web.get("/favicon.ico", self.no_icon),
                web.get("/state", self.state),
                web.post("/vote", self.vote),
                web.post("/undo", self.undo),
            ]
        )

    @web.middleware
    async def _guard(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Refuse whoever has not the token, and turn a link's token into a cookie."""
        given = request.query.get("token", "")
        if request.path == "/" and self._knows(given):
            welcome = web.HTTPSeeOther("/")
            welcome.set_cookie(COOKIE, self.token, httponly=True, samesite="Strict", path="/")
            welcome.headers.update(HEADERS)
            raise welcome
        if not self._knows(request.cookies.get(COOKIE, "")):
            return web.Response(status=403, text="This page needs the whole link, with its token.", headers=HEADERS)
        try:
            response = await handler(request)
        except UserError as error:
            response = web.json_response({"error": error.text()}, status=400)
        response.headers.update(HEADERS)
        return response

    def _knows(self, token: str) -> bool:
        return hmac.compare_digest(token.encode(), self.token.encode())

    async def page(self, request: web.Request) -> web.Response:
        return web.Response(text=asset("page.html"), content_type="text/html")

    async def asset(self, request: web.Request) -> web.Response:
        name = request.match_info["name"]
        if name not in ASSETS:
            raise web.HTTPNotFound
        return web.Response(text=asset(name), content_type=ASSETS[name])

    async def no_icon(self, request: web.Request) -> web.Response:
        return web.Response(status=204)

    async def picture(self, request: web.Request) -> web.Response:
        where = self.pictures.get(request.match_info["key"])
        if where is None:
            raise web.HTTPNotFound
        return web.Response(body=self.study.picture(*where), content_type="image/png")

    async def state(self, request: web.Request) -> web.Response:
        return web.json_response(self._state(clean_name(request.query.get("rater", ""))))

    async def vote(self, request: web.Request) -> web.Response:
        """Write the answer to the open question, then return the next one. Another question's answer is dropped."""
        given = await _body(request)
        rater = clean_name(given.get("rater", ""))
        answer, seconds = given.get("answer"), given.get("seconds")
        if answer not in (-1, 0, 1) or isinstance(answer, bool):
            raise UserError(setting="answer", value=answer, expected="-1, 0 or 1")
        if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not 0 <= seconds < 1e6:
            raise UserError(setting="seconds", value=seconds, expected="seconds from the picture to the answer")
        done, ask = self._open(rater)
        if given.get("id") == self._id(rater, done, ask):
            self.study.book.add(rater, new_row(done, ask, answer, round(float(seconds), 2)))
        return web.json_response(self._state(rater))

    async def undo(self, request: web.Request) -> web.Response:
        """Take back the rater's last answer."""
        rater = clean_name((await _body(request)).get("rater", ""))
        self.study.book.undo(rater)
        return web.json_response(self._state(rater))

    def _open(self, rater: str) -> tuple[int, Ask]:
        """Return how many answers the rater has given, and the open question."""
        study, votes = self.study, self.study.book.read()
        ask = next_ask(len(study.contenders), study.items, votes, rater, study.honest, study.seed)
        return len(votes.get(rater, [])), ask

    def _state(self, rater: str) -> dict[str, Any]:
        done, ask = self._open(rater)
        return {
            "rater": rater,
            "id": self._id(rater, done, ask),
            "number": done,
            "goal": self.goal,
            "question": QUESTIONS[self.study.question],
            "label": self.study.label(ask.item) if self.study.question == "label" else "",
            "left": self._address(ask.left, ask.item),
            "right": self._address(ask.right, ask.item),
        }

    def _id(self, rater: str, number: int, ask: Ask) -> str:
        """Return the identity of a question, which says nothing about it."""
        return hmac.new(self.token.encode(), f"{rater}\n{number}\n{ask}".encode(), "sha256").hexdigest()[:24]

    def _address(self, contender: int, item: int) -> str:
        """Return a new address of a picture, from which nobody can tell the contender."""
        key = secrets.token_urlsafe(12)
        self.pictures[key] = (contender, item)
        while len(self.pictures) > MOST_PICTURES:
            self.pictures.popitem(last=False)
        return f"/picture/{key}"


async def _body(request: web.Request) -> dict[str, Any]:
    """Return the request's JSON object."""
    try:
        given = json.loads(await request.text())
    except ValueError:
        given = None
    if not isinstance(given, dict):
        raise UserError(setting="request", value="", expected="a JSON object")
    return given
